import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.utils import pt_to_pil
from helpers import ROOT, encode, last_wins, launch_two, metrics_without_times, options, train_video
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, VideoMAEModel, VivitModel

from difftrain_utils.builtins.moving_shapes import MOVING, draw_clip
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.load import load_data
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.clip_metrics import load_clip_features, load_clip_networks, spread_frames
from difftrain_utils.evaluation.distances import frechet_distance, kernel_distance
from difftrain_utils.evaluation.image_metrics import image_metrics
from difftrain_utils.evaluation.validation import validation_losses
from difftrain_utils.families.load import load_family
from difftrain_utils.media.video import LOSSLESS, Clip, write_video

SCRIPT = ROOT / "train_text_to_video.py"


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """18 clips of moving shapes, of 7 frames or of 5, and 6 stills, with captions of their own."""
    folder, lines = tmp_path_factory.mktemp("films"), []
    for number in range(24):
        frames, caption = draw_clip(number * 5, 32, 7 - 2 * (number % 2))
        name = f"{number}.{'avi' if number % 4 else 'png'}"
        if number % 4:
            write_video(frames, 8, folder / name, **LOSSLESS)
        else:
            (folder / name).write_bytes(encode(frames[0]))
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(films, networks_folder, tmp_path) -> list[str]:
    """Options of a run of clips and stills, half of them held out, that measures four of these."""
    data = {"dataset": str(films), "num_frames": 5, "height": 32, "width": 32, "fps": 8, "window": "start"}
    data |= {"center_crop": True, "validation_split": 0.5, "cache_dir": str(tmp_path / "cache"), "num_workers": 0}
    data["buckets"] = [[5, 32, 32], [1, 32, 32]]
    train = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2, "eval_every": 2, "save_every": 0}
    evaluation = {"fvd_features": str(networks_folder / "videomae"), "fid_features": str(networks_folder / "vit")}
    evaluation |= {"clip_score_model": str(networks_folder / "clip"), "num_metric_images": 6, "batch_size": 2}
    evaluation |= {"num_inference_steps": 2, "guidance_scale": 1, "num_validation_samples": 16}
    sections = {"data": data, "train": train, "evaluation": evaluation}
    fields = {f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()}
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-wan", "model.max_sequence_length": 40}
    return options(model | fields)


def parse(argv: list[str], **fields) -> TextToVideoConfig:
    return command_line.parse_config(TextToVideoConfig, last_wins([*argv, *options(fields)]))


def noise(number: int, num_frames: int = 5) -> Clip:
    pixels = np.random.default_rng(number).integers(0, 255, (num_frames, 32, 40, 3), np.uint8)
    return Clip([Image.fromarray(frame) for frame in pixels], 8)


# ── Networks ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name, network", [("videomae", VideoMAEModel), ("vivit-head", VivitModel)])
def test_the_features_of_a_clip_are_the_mean_over_a_video_networks_tokens(networks_folder, name, network):
    """Of the frames that are equally far apart, prepared as the network's own processor prepares a video."""
    clips = [noise(number) for number in range(2)]
    features = load_clip_features(str(networks_folder / name), torch.device("cpu"))(clips)
    processor = AutoImageProcessor.from_pretrained(networks_folder / name, backend="pil")
    frames = [[clip.frames[i] for i in (0, 1, 3, 4)] for clip in clips]
    pixels = processor(frames, return_tensors="pt")["pixel_values"]
    own = network.from_pretrained(networks_folder / name).eval()
    assert pixels.shape == (2, 4, 3, 24, 24)
    assert torch.equal(features, own(pixels).last_hidden_state.mean(1)) and features.shape == (2, 16)
    assert not torch.allclose(features[0], features[1])


def test_frames_are_equally_far_apart_and_some_twice_where_there_are_few():
    assert spread_frames(range(81), 5) == [0, 20, 40, 60, 80]
    assert spread_frames(range(3), 5) == [0, 0, 1, 2, 2]
    assert spread_frames([7], 4) == [7] * 4 and spread_frames(range(9), 1) == [0]


# ── Held-out clips of several sizes ──────────────────────────────────────────────────────────────────────────
def test_metrics_and_losses_of_held_out_clips_and_stills(run, capsys):
    """Each row in its own size, whatever the batches: the loss of each is the same, and the metrics are those of the
    clips themselves; a still has no FVD."""
    config = parse(run, **{"evaluation.num_metric_images": 8})
    family, accelerator = load_family(config), Accelerator()
    rows = load_data(accelerator, family, config).validation_rows
    sizes = [rows.buckets.size_of(row) for row in range(8)]
    assert set(sizes) == {(5, 32, 32), (1, 32, 32)} and sizes.count((5, 32, 32)) >= 2
    denoiser = family.load_denoiser().eval()
    losses = []
    for config.evaluation.batch_size in (16, 3):
        losses.append(validation_losses(accelerator, family, denoiser, rows, config))
    assert torch.allclose(*losses, rtol=1e-5) and losses[0].unique().numel() == 16

    networks = load_clip_networks(config, rows, torch.device("cpu"))
    warning = (
        f"warning: evaluation.num_metric_images: fvd is unreliable: {sizes.count((5, 32, 32))} clips for 16 features"
    )
    assert warning in capsys.readouterr().err

    real, asked = {}, []

    def draw(denoiser, prompts, *size, generators, **options):
        """Another colour of what the captions say."""
        asked.extend((prompt, size) for prompt in prompts)
        return [Clip([change(frame) for frame in real[prompt].frames], 8) for prompt in prompts]

    def change(frame: Image.Image) -> Image.Image:
        frame = frame.copy()
        ImageDraw.Draw(frame).rectangle((0, 0, 12, 9), fill="white")
        return frame

    read = [sample_of(rows, row, config) for row in range(8)]
    real |= {caption: clip for caption, clip in read}
    drawing = SimpleNamespace(generate=draw, first_frames="none")
    found = image_metrics(accelerator, networks, drawing, None, rows, config)
    assert sorted(asked) == sorted((caption, size) for (caption, _), size in zip(read, sizes, strict=True))

    clips = [clip for _, clip in read]
    pairs = clips, [Clip([change(frame) for frame in clip.frames], 8) for clip in clips]
    moving = [[clip for clip in of if len(clip.frames) > 1] for of in pairs]
    features = [networks["fvd_features"](of).double() for of in moving]
    assert found["fvd"] == pytest.approx(frechet_distance(*features), rel=1e-4) and found["fvd"] > 0
    assert found["kvd"] == pytest.approx(kernel_distance(*features), rel=1e-3)
    middle = [networks["fid_features"]([Clip([clip.frames[len(clip.frames) // 2]], 8) for clip in of]) for of in pairs]
    assert found["fid"] == pytest.approx(frechet_distance(*(of.double() for of in middle)), rel=1e-4)
    of_frames = [
        np.mean([networks["clip_score_model"]([Clip([frame], 8)], [caption]).item() for frame in clip.frames])
        for (caption, _), clip in zip(read, pairs[1], strict=True)
    ]
    assert found["clip_score"] == pytest.approx(np.mean(of_frames), rel=1e-4)


def sample_of(rows, row: int, config) -> tuple[str, Clip]:
    """A row's caption and its clip, as training with its middle would see it."""
    from difftrain_utils.data.samples import read_held_out

    batch = read_held_out(rows, [row], config.data, 0)
    return batch["captions"][0], Clip(pt_to_pil(batch["pixel_values"][0].transpose(0, 1)), 8)


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────
REFUSED = [
    (
        {"evaluation.fvd_features": "{}/clip"},
        "evaluation.fvd_features: cannot use .*: it is no video model: its config",
    ),
    ({"evaluation.fvd_features": "no/such"}, "evaluation.fvd_features: cannot use 'no/such': "),
    ({"evaluation.num_metric_images": 99}, "evaluation.num_metric_images: there are .* held-out videos, got 99$"),
    (
        {"data.dataset": "builtin:moving-shapes", "evaluation.shapes_judge": True, "evaluation.prompts": ["a horse"]},
        "evaluation.prompts: 'a horse' is no caption of builtin:moving-shapes, such as 'a red circle moving left'$",
    ),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=["image model", "no model", "too many", "no caption"])
def test_what_cannot_be_is_said_before_anything_is_written(
    run, networks_folder, tmp_path, fields, message, monkeypatch
):
    monkeypatch.setattr("difftrain_utils.data.videos.NUM_MOVING_SHAPES", 40)
    fields = {
        name: value.format(networks_folder) if isinstance(value, str) else value for name, value in fields.items()
    }
    with pytest.raises(InputError, match=f"^{message}"):
        train_video([*run, *options({"data.buckets": None, "data.on_bad_row": "skip"} | fields)])
    assert not (tmp_path / "run").exists()


def test_held_out_clips_are_needed(run):
    with pytest.raises(InputError, match=r"^evaluation.fvd_features: needs held-out data: data.validation_split or"):
        parse(run, **{"data.validation_split": 0, "evaluation.fid_features": None, "evaluation.clip_score_model": None})
    assert parse(run, **{"train.keep_best": "kvd"}).metrics["kvd"][0]
    with pytest.raises(InputError, match=r"^train.keep_best: needs evaluation.fvd_features, and train.eval_every"):
        parse(run, **{"train.keep_best": "fvd", "evaluation.fvd_features": None})


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, tmp_path):
    """Clips and stills that do not split evenly over them, and a grid that moves."""
    argv = [*run, *options({"evaluation.num_metric_images": 7, "evaluation.prompts": MOVING[:3]})]
    argv += options({"optimizer.init_args.lr": 0, "lr_scheduler.num_warmup_steps": 0, "train.max_steps": 2})
    one = train_video([*argv, "--train.keep_best", "fvd"])
    assert (one / "weights/best.safetensors").is_file()
    assert sorted(path.name for path in (one / "samples").iterdir()) == ["step-000002.mp4", "step-000002.webp"]
    result = launch_two([*argv, "--train.output_dir", str(tmp_path / "two")], script=SCRIPT)
    assert result.returncode == 0, result.stderr
    expected, got = metrics_without_times(one)[-1], metrics_without_times(tmp_path / "two")[-1]
    for name in ("validation_loss", "fvd", "kvd", "fid", "kid", "clip_score"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3), name
