import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import pt_to_pil
from helpers import launch_two, metrics_without_times, parse_config, pipeline_bytes, train
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    ViTModel,
)

from difftrain_utils.builtins.tiny_stable_diffusion.make import make_tokenizer
from difftrain_utils.commands.compare import load_runs, summary_table
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.distances import frechet_distance, kernel_distance
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.image_metrics import image_metrics, load_metric_networks
from difftrain_utils.families.load import load_family
from difftrain_utils.media import image as images
from difftrain_utils.run.launch import check_launch


@pytest.fixture
def measured_run(short_run, networks_folder) -> list[str]:
    """A short run that draws its three held-out captions every third step."""
    return [
        *short_run,
        *("--data.validation_split", "0.3", "--train.eval_every", "3", "--evaluation.num_validation_samples", "8"),
        *("--evaluation.num_inference_steps", "2", "--evaluation.batch_size", "2"),
        *("--evaluation.fid_features", str(networks_folder / "vit"), "--evaluation.num_metric_images", "3"),
        *("--evaluation.clip_score_model", str(networks_folder / "clip")),
    ]


def test_the_features_are_the_pooled_output_of_each_kind_of_network(measured_run, networks_folder, capsys):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)) for i in range(2)]
    pixels = CLIPImageProcessor.from_pretrained(networks_folder / "vit")(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 24, 24)
    towers = {
        "vit": ViTModel.from_pretrained(networks_folder / "vit"),
        "vision": CLIPVisionModel.from_pretrained(networks_folder / "vision"),
        "clip": CLIPModel.from_pretrained(networks_folder / "clip").vision_model,
    }
    for name, tower in towers.items():
        config = parse_config([*measured_run, "--evaluation.fid_features", str(networks_folder / name)])
        features = load_metric_networks(config, range(3), torch.device("cpu"))["fid_features"](images)
        assert features.shape == (2, 16) and torch.equal(features, tower.eval()(pixels).pooler_output)
        assert not torch.allclose(features[0], features[1])
        assert "fid is unreliable: 3 images for 16 features; it takes 32" in capsys.readouterr().err


def test_the_metrics_of_a_pipeline(measured_run, networks_folder, image_folder):
    """All three from the pictures of the pipeline itself; the held-out images against themselves have none."""
    config = parse_config(measured_run)
    family = load_family(config)
    denoiser = family.load_denoiser().eval()
    _, held_out = split_rows(map_rows(config.data), config.data)
    state = torch.get_rng_state()
    networks = load_metric_networks(config, held_out, torch.device("cpu"))
    got = image_metrics(Accelerator(), networks, family, denoiser, held_out, config)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from what training could see

    rows = [held_out[k] for k in range(3)]
    size = images.size_of(config.data)
    squares = torch.stack([images.read(row, images.MIDDLE, size, config.data)["pixel_values"] for row in rows])
    real = pt_to_pil(squares)
    assert np.array_equal(np.asarray(real[0]), ((squares[0] + 1) * 127.5).round().byte().permute(1, 2, 0))
    captions = [row.captions for row in rows]
    generated = generate(family, denoiser, config.evaluation, (32, 32), captions, range(3))
    vit = ViTModel.from_pretrained(networks_folder / "vit").eval()
    processor = CLIPImageProcessor.from_pretrained(networks_folder / "vit")
    features = [vit(**processor(images, return_tensors="pt")).pooler_output.double() for images in (real, generated)]
    assert got["fid"] == pytest.approx(frechet_distance(*features), rel=1e-5)
    assert got["kid"] == pytest.approx(kernel_distance(*features), rel=1e-3)

    clip, tokenizer = CLIPModel.from_pretrained(networks_folder / "clip").eval(), make_tokenizer()

    def clip_score(images) -> float:
        cosines = []
        for image, caption in zip(images, captions, strict=True):  # one by one: no padding
            pixels = processor([image], return_tensors="pt")["pixel_values"]
            of_image = clip.visual_projection(clip.vision_model(pixels).pooler_output)
            tokens = tokenizer([caption], return_tensors="pt").input_ids
            of_text = clip.text_projection(clip.text_model(tokens).pooler_output)
            cosines.append(torch.cosine_similarity(of_image, of_text).clamp(min=0).item())
        return 100 * float(np.mean(cosines))

    assert got["clip_score"] == pytest.approx(clip_score(generated), rel=1e-4) and got["clip_score"] > 1

    def perfect(denoiser, prompts, *_, **__):  # draws the held-out images
        return [real[captions.index(prompt)] for prompt in prompts]

    with torch.autocast("cpu", torch.bfloat16):  # as in a bf16 run: the networks stay in float32
        drawn = SimpleNamespace(generate=perfect)
        perfect_metrics = image_metrics(Accelerator(), networks, drawn, denoiser, held_out, config)
    assert abs(perfect_metrics["fid"]) < 1e-5 < got["fid"]
    assert perfect_metrics["clip_score"] == pytest.approx(clip_score(real), rel=1e-4) != got["clip_score"]


def test_a_run_logs_them_resumes_exactly_and_is_otherwise_the_same(measured_run, short_run, tmp_path):
    run = train(measured_run)
    logged = {entry["step"]: entry for entry in metrics_without_times(run) if "fid" in entry}
    assert list(logged) == [3, 6] and logged[3]["fid"] != logged[6]["fid"] and logged[6]["clip_score"] >= 0
    config = parse_config(measured_run)
    _, held_out = split_rows(map_rows(config.data), config.data)
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")  # the EMA weights after the last step
    pipeline.set_progress_bar_config(disable=True)

    def draw(denoiser, prompts, height, width, generators, **options):  # with plain diffusers
        return pipeline(prompts, height, width, generator=generators, **options).images

    networks, family = load_metric_networks(config, held_out, torch.device("cpu")), SimpleNamespace(generate=draw)
    for name, value in image_metrics(Accelerator(), networks, family, None, held_out, config).items():
        assert logged[6][name] == pytest.approx(value, rel=1e-4)
    resumed = train([*measured_run, "--output-dir", str(tmp_path / "b"), "--resume-from", str(run / "checkpoint-4")])
    assert metrics_without_times(resumed) == metrics_without_times(run)[4:]
    without = train([*short_run, "--data.validation_split", "0.3", "--output-dir", str(tmp_path / "c")])
    assert pipeline_bytes(without) == pipeline_bytes(resumed) == pipeline_bytes(run)
    losses = [[entry["loss"] for entry in metrics_without_times(path)] for path in (run, without)]
    assert losses[0] == losses[1]
    header, row = summary_table(load_runs([run]))[:2]
    assert [header.count(name) for name in ("fid", "kid", "clip_score")] == [1, 1, 1]
    assert float(row[header.index("fid")]) == pytest.approx(logged[6]["fid"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_measure_what_one_does(measured_run, tmp_path, shard):
    """Three images do not split evenly over them."""
    argv = [*measured_run, "--train.max_steps", "1", "--lr_scheduler.num_warmup_steps", "0"]
    argv += ["--optimizer.init_args.lr", "0"]  # the same weights, whatever dropout did
    one = train(argv)
    result = launch_two([*argv, "--train.shard", shard, "--output-dir", str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    (expected,), (got,) = metrics_without_times(one), metrics_without_times(tmp_path / "two")
    for name in ("fid", "kid", "clip_score"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3)


class TestRefusals:
    """One line that names the field, before the run's folder is made."""

    @pytest.mark.parametrize("field", ["fid_features", "clip_score_model"])
    def test_without_held_out_images(self, short_run, field):
        with pytest.raises(InputError, match=rf"evaluation.{field}: needs held-out data: data.validation_split"):
            parse_config([*short_run, f"--evaluation.{field}", "some/network"])

    def test_one_image(self, measured_run):
        with pytest.raises(InputError, match=r"evaluation.num_metric_images: must be at least 2, got 1"):
            parse_config([*measured_run, "--evaluation.num_metric_images", "1"])

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("num_metric_images 4", "num_metric_images: there are 3 held-out images, got 4$"),
            ("fid_features no/such", "fid_features: cannot use 'no/such': "),
            (
                "fid_features {}/vit-head",
                "fid_features: cannot use .*: it has no weights for pooler.dense.bias, pooler",
            ),
            ("fid_features {}/unprepared", "fid_features: cannot use .*: Can't load image processor for"),
            ("fid_features inception", r"fid_features: inception needs torch-fidelity \(pip install torch-fidelity\)"),
            ("clip_score_model no/such", "clip_score_model: cannot use 'no/such': "),
            ("clip_score_model {}/vision", "clip_score_model: cannot use .*: it has no weights for "),
            (
                "clip_score_model {}/wordless",
                r"clip_score_model: cannot use .*: its tokenizer has 2 tokens, its text mod",
            ),
        ],
    )
    def test_before_training(self, measured_run, networks_folder, tmp_path, monkeypatch, argv, message):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if not installed
        shutil.copytree(networks_folder, tmp_path / "networks")
        shutil.copytree(networks_folder / "vit", tmp_path / "networks/unprepared")
        (tmp_path / "networks/unprepared/preprocessor_config.json").unlink()
        shutil.copytree(networks_folder / "clip", tmp_path / "networks/wordless")
        (tmp_path / "networks/wordless/tokenizer.json").unlink()
        name, value = argv.format(tmp_path / "networks").split(" ")
        with pytest.raises(InputError, match=rf"^evaluation.{message}"):
            train([*measured_run, f"--evaluation.{name}", value])
        assert not (tmp_path / "run").exists()

    def test_only_inception_needs_torchmetrics(self, measured_run, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        check_launch(parse_config(measured_run), Accelerator())
        with pytest.raises(InputError, match=r"evaluation.fid_features: torchmetrics is not installed \(pip install"):
            check_launch(parse_config([*measured_run, "--evaluation.fid_features", "inception"]), Accelerator())
