import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, ViTModel

from difftrain_utils.builtins.scenes import draw_scene
from difftrain_utils.commands import score
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.distances import frechet_distance, kernel_distance, neighbours
from difftrain_utils.evaluation.image_metrics import load_clip
from difftrain_utils.evaluation.scores import Networks, distances, embed, too_few


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`drawn`, 18 scenes with their captions, and `real`, other ones without captions and of another size."""
    folder = tmp_path_factory.mktemp("scored")
    for name, size, seed in (("drawn", 32, 0), ("real", 48, 1)):
        (folder / name).mkdir()
        lines = []
        for index in range(18):
            image, caption = draw_scene(index, size, seed)
            image.save(folder / name / f"{index:02d}.png")
            lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": caption}))
        if name == "drawn":
            (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_the_scores_of_a_folder(folders, networks_folder, tmp_path, capsys):
    """Those of pixels and captions as they are, without any run."""
    vit, clip = networks_folder / "vit", networks_folder / "clip"
    argv = [str(folders / "drawn"), "--reference", str(folders / "real"), "--features", str(vit), "--clip", str(clip)]
    score.main([*argv, "--judge", "scenes", "--batch-size", "5", "--output", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "scores.json").read_text())
    scores = {name: of["value"] for name, of in found["scores"].items()}
    assert scores["scenes_right"] == scores["scenes_position"] == 1
    assert found["num_images"] == 18 and all(name in printed for name in scores)

    drawn, real = (
        [Image.open(folders / name / f"{i:02d}.png").convert("RGB") for i in range(18)] for name in ("drawn", "real")
    )
    real = [image.resize((32, 32), Image.Resampling.LANCZOS) for image in real]
    features = []
    processor = CLIPImageProcessor.from_pretrained(vit)
    for images in (real, drawn):
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        features.append(ViTModel.from_pretrained(vit).eval()(pixels).pooler_output.detach().double())
    assert scores["fid"] == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert scores["kid"] == pytest.approx(kernel_distance(*features), rel=1e-3)
    assert scores["coverage"] == neighbours(*features).coverage
    assert found["scores"]["fid"]["error"] > 0 and scores["fid_infinity"] < scores["fid"] and "cmmd" in scores
    assert found["note"] == "fid and fid_infinity are unreliable: 18 images for 16 features; it takes 32"
    assert found["note"] in printed
    captions = [draw_scene(i, 32)[1] for i in range(18)]
    model, pixels = CLIPModel.from_pretrained(clip).eval(), processor(drawn, return_tensors="pt")["pixel_values"]
    embedded = model.visual_projection(model.vision_model(pixels).pooler_output)
    _, of_captions = load_clip(str(clip), torch.device("cpu"))(drawn, captions)
    cosines = torch.cosine_similarity(embedded, of_captions).clamp(min=0)
    assert scores["clip_score"] == pytest.approx(100 * cosines.mean().item(), rel=1e-4)


def test_what_is_real_is_at_no_distance_from_itself():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 8)))
    found = distances({"features": values, "embeddings": values}, {"features": values, "embeddings": values})
    assert abs(found["fid"].value) < 1e-9 and found["precision"].value == found["coverage"].value == 1
    assert too_few({"features": values}, {"features": values}) is None
    assert embed(Networks(None, None), [], [], 4) == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("{}/drawn", r"difftrain score: nothing to say without --features, --clip or --judge"),
        ("{}/drawn --features some/network", "--features: needs --reference"),
        ("{}/drawn --judge shapes --reference {}/real", "--reference: needs --features or --clip"),
        ("{}/none --judge scenes", "FOLDER: cannot load '.*none'"),
        ("{}/real --judge scenes", "FOLDER: .*00.png has no caption .*or a metadata.jsonl, or let difftrain caption"),
        ("{}/drawn --judge scenes --output scores.txt", "--output scores.txt: must end in .json"),
        ("{}/drawn --judge shapes", "--judge shapes: 'a [a-z]+' is no caption of builtin:shapes or"),
        ("{}/drawn --clip no/such", "--clip: cannot use 'no/such'"),
    ],
)
def test_what_is_refused(folders, argv, message):
    with pytest.raises(InputError, match=f"^{message}"):
        score.main(argv.replace("{}", str(folders)).split())
