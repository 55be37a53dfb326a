"""train_text_to_video.py keeps the promises of the image script, and trains all strategies on clips."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from helpers import (
    ROOT,
    VIDEO_SCRIPT,
    assert_resumes,
    assert_shared_out,
    assert_splits,
    assert_survives_a_kill,
    encode,
    forget_accelerator,
    last_wins,
    launch_two,
    losses_of,
    metrics_without_times,
    options,
    reproduce,
    train_video,
    weights_of,
)
from PIL import Image
from safetensors.torch import load_file

from difftrain_utils.config import command_line
from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.data.rows import map_rows
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.validation import fixed_triples
from difftrain_utils.families.load import load_family
from difftrain_utils.families.wan import Wan
from difftrain_utils.media.video import LOSSLESS, write_video
from difftrain_utils.objective.noise import unit_noise
from difftrain_utils.objective.schedule import Schedule, append_dims

WAN = {"model.pretrained_model_name_or_path": "builtin:tiny-wan"}
COGVIDEOX = {"model.pretrained_model_name_or_path": "builtin:tiny-cogvideox"}
LTX = {"model.pretrained_model_name_or_path": "builtin:tiny-ltx"}
ONE_CLIP = {"data.center_crop": True, "data.window": "middle"}
CACHES = ONE_CLIP | {"data.cache_latents": True, "data.cache_text": True}
BUCKETS = {
    "data.dataset": "mixed",
    "data.validation_dataset": None,
    "data.buckets": [[5, 32, 32], [5, 32, 64], [1, 32, 32]],
}
FULL = {"train.shard": "full"}


@pytest.fixture(scope="session")
def mixed_videos(tmp_path_factory) -> Path:
    """Videos of noise, every third of them wide, and stills."""
    folder, rng = tmp_path_factory.mktemp("data") / "mixed-videos", np.random.default_rng(0)
    folder.mkdir()
    names = [f"{i}.avi" for i in range(12)] + [f"{i}.png" for i in range(12, 17)]
    for i, name in enumerate(names):
        size = (36, 60 if i % 3 == 0 and i < 12 else 36)
        frames = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(6 + i % 3 * 5)]
        buffer = io.BytesIO()
        if name.endswith("avi"):
            write_video(frames, 8, buffer, **LOSSLESS)
        (folder / name).write_bytes(buffer.getvalue() or encode(frames[0]))
    lines = [json.dumps({"file_name": name, "text": f"caption {i % 4}"}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def video_run(video_folder, tmp_path) -> list[str]:
    return short_options(video_folder, tmp_path / "run")


def short_options(video_folder: Path, output_dir: Path) -> list[str]:
    """Options of a run of seconds."""
    return options(
        {
            **WAN,
            "model.max_sequence_length": 40,
            "data.dataset": video_folder,
            "data.validation_dataset": video_folder,
            "data.num_frames": 5,
            "data.height": 32,
            "data.width": 32,
            "data.fps": 8,
            "data.caption_dropout": 0.2,
            "data.cache_dir": output_dir.with_name("cache"),
            "train.output_dir": output_dir,
            "train.max_steps": 4,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 2,
            "train.keep_checkpoints": 0,
            "train.cpu_threads": 1,
            "optimizer.init_args.lr": 1e-3,
            "evaluation.num_validation_samples": 8,
            "evaluation.num_inference_steps": 2,
        }
    )


def test_a_run_is_the_same_twice_resumed_and_split(video_run, tmp_path):
    """With windows at random; evaluating changes nothing, and plain diffusers loads what is exported."""
    evaluated = options({"train.eval_every": 4, "evaluation.prompts": ["a red circle moving left"]})
    unbroken = train_video([*video_run, *evaluated])
    again = train_video([*video_run, "--output-dir", str(tmp_path / "again")])
    assert weights_of(again) == weights_of(unbroken)
    metrics = metrics_without_times(unbroken)
    evaluations = [{name: entry.pop(name) for name in [*entry] if name.startswith("validation")} for entry in metrics]
    assert metrics_without_times(again) == metrics
    assert 0 < evaluations[3]["validation_loss_ema"] < 10 and len(evaluations[3]["validation_loss_bins"]) == 8
    assert {path.suffix for path in (unbroken / "samples").iterdir()} == {".mp4", ".webp"}
    assert_resumes(train_video, [*video_run, *evaluated], unbroken)
    assert_splits(train_video, video_run, unbroken, 2, 4)
    ema, pipeline = load_file(unbroken / "checkpoint-4/ema.safetensors"), unbroken / "pipeline"
    trained = DiffusionPipeline.from_pretrained(pipeline).transformer.parameters()
    assert all(parameter.equal(ema[str(i)]) for i, parameter in enumerate(trained))


VARIANTS = {
    "ltx": LTX | {"train.eval_every": 2, "data.window": "start", "train.gradient_checkpointing": True},
    "wan-buckets": BUCKETS | {"data.num_workers": 1},
    "ltx-buckets-cached": LTX | BUCKETS | CACHES,
    "wan-all-adapters": {"data.window": "all", "model.lora.rank": 4, "model.lora.merge": True, "data.cache_text": True},
    "cogvideox": COGVIDEOX | {"data.num_frames": 9, "data.window": "start", "train.eval_every": 2},
    "wan-stream": {"data.streaming": True, "data.shuffle_buffer": 4, "data.lanes": 4},
}


def argv_of(video_run: list[str], fields: dict, mixed_videos: Path) -> list[str]:
    is_mixed = fields.get("data.dataset") == "mixed"
    return [*video_run, *options(fields | ({"data.dataset": mixed_videos} if is_mixed else {}))]


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_so_are_other_runs(video_run, mixed_videos, fields):
    argv = argv_of(video_run, fields, mixed_videos)
    unbroken = train_video(argv)
    assert_resumes(train_video, argv, unbroken)
    assert_splits(train_video, argv, unbroken, 4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, LTX], ids=["wan", "ltx"])
def test_caches_change_nothing(video_run, tmp_path, fields):
    """Neither the clips' moments nor the captions' states, in training and validation."""
    fields, runs = fields | {"train.max_steps": 2, "train.eval_every": 2, "train.save_every": 0}, []
    for name, caches in (("plain", ONE_CLIP), ("cached", CACHES)):
        runs.append(train_video([*video_run, *options(fields | caches | {"train.output_dir": tmp_path / name})]))
    plain, cached = (losses_of(run, "validation_loss", "validation_loss_ema") for run in runs)
    assert len(plain) == 4 and cached == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, LTX | FULL | BUCKETS], ids=["wan-ddp", "ltx-fsdp2-buckets"])
def test_two_processes_train_as_one(video_run, mixed_videos, tmp_path, fields):
    argv = argv_of(video_run, fields | {"train.max_steps": 3, "train.save_every": 0}, mixed_videos)
    launch_two(argv, script=VIDEO_SCRIPT).check_returncode()
    alone = train_video([*argv, "--output-dir", str(tmp_path / "alone")])
    assert losses_of(tmp_path / "run", "grad_norm") == pytest.approx(losses_of(alone, "grad_norm"), rel=1e-5)


@pytest.mark.slow
def test_what_two_processes_share_out_they_resume_and_so_does_one(video_run, tmp_path):
    argv = [*video_run, *options({"evaluation.prompts": ["a", "b"]})]
    assert_shared_out(train_video, argv, VIDEO_SCRIPT, tmp_path)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(video_run, tmp_path):
    argv = [*video_run, *options({"train.max_steps": 20, "train.save_every": 4})]
    assert len(assert_survives_a_kill(train_video, argv, VIDEO_SCRIPT, tmp_path, after=9)) == 2


@pytest.mark.slow
def test_reproduce_finds_the_same_bits(video_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", [str(VIDEO_SCRIPT)])  # what runs in this process record as their command
    run = train_video([*video_run, "--train.eval_every", "4"])
    assert reproduce(run, tmp_path / "again", monkeypatch) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("bit-identical: ")


# ── Strategies ───────────────────────────────────────────────────────────────────────────────────────────────
COVERING = {
    "dream-logit-normal": {
        "strategy.dream_training": True,
        "strategy.dream_start_step": 1,
        "timesteps.density": "logit_normal",
        "scheduler.flow_shift": 2.0,
        "loss.weighting": "sigma_sqrt",
    },
    "dream-half-sample-offset": {
        "strategy.dream_training": True,
        "strategy.dream_probability": 0.5,
        "model.prediction_type": "sample",
        "noise.offset": 0.1,
        "noise.input_perturbation": 0.1,
        "loss.weighting": "debiased",
    },
    "zero-snr-v-stratified-p2": {
        "scheduler.path": "ddpm",
        "scheduler.beta_schedule": "scaled_linear",
        "scheduler.rescale_betas_zero_snr": True,
        "model.prediction_type": "v_prediction",
        "timesteps.stratified": True,
        "loss.weighting": "p2",
        "loss.type": "huber",
        "loss.huber_schedule": "snr",
    },
    "epsilon-pyramid-soft-min-snr": {
        "scheduler.path": "ddpm",
        "scheduler.beta_schedule": "linear",
        "model.prediction_type": "epsilon",
        "noise.pyramid_discount": 0.8,
        "loss.weighting": "soft_min_snr",
        "loss.type": "l1",
        "timesteps.density": "mode",
    },
    "cosine-edm-learned-uncertainty": {
        "scheduler.path": "cosine",
        "model.prediction_type": "v_prediction",
        "loss.learned_uncertainty": True,
        "loss.weighting": "edm",
        "loss.edm_sigma_data": 1.0,
        "timesteps.density": "log_normal",
        "timesteps.p_mean": -0.5,
    },
    "nearest-progressive": {
        "noise.pairing": "nearest",
        "noise.frame_correlation": "progressive",
        "noise.frame_correlation_strength": 2.0,
        "train.group_size": 2,
        "timesteps.density": "table",
        "timesteps.table": [1.0, 2.0, 1.0],
        "loss.type": "smooth_l1",
        "loss.huber_schedule": "exponential",
        "train.eval_every": 2,
        "evaluation.prompts": ["a red circle moving left"],
        **LTX,
    },
    "transport-contrastive": {
        "noise.pairing": "transport",
        "loss.contrastive": 0.05,
        "data.caption_dropout": 0.5,
        "train.group_size": 2,
        "loss.weighting": "min_snr",
        **LTX,
        **CACHES,
    },
    "dream-contrastive-first-frames": {
        "model.first_frame_probability": 0.5,
        "strategy.dream_training": True,
        "loss.contrastive": 0.05,
        "loss.weighting": "min_snr",
        "train.group_size": 2,
        **LTX,
    },
    "knn-mixed-offset": {
        "noise.pairing": "knn",
        "noise.knn_candidates": 3,
        "noise.frame_correlation": "mixed",
        "noise.offset": 0.1,
        "loss.contrastive": 0.05,
        "train.group_size": 2,
        "loss.weighting": "snr",
    },
    "cosmap-range-sample-jit": {
        "model.prediction_type": "sample",
        "scheduler.flow_shift": 1.5,
        "timesteps.density": "cosmap",
        "timesteps.min": 0.1,
        "timesteps.max": 0.9,
        "timesteps.stratified": True,
        "loss.weighting": "flow",
        "ema.power_sigma_rels": [0.1],
        **LTX,
    },
}
QUICK = ("knn-mixed-offset",)


@pytest.fixture(scope="module")
def plain_losses(video_folder, tmp_path_factory):
    """plain_losses(fields): those of the same model without any strategy."""

    @functools.cache
    def of_model(name: str) -> list[float]:
        argv = short_options(video_folder, tmp_path_factory.mktemp("runs") / "plain")
        return losses_of(train_video([*argv, "--model.pretrained_model_name_or_path", name, "--train.save_every", "0"]))

    return lambda fields: of_model((WAN | fields)["model.pretrained_model_name_or_path"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in COVERING])
def test_strategies_train_resume_and_split_exactly(video_run, plain_losses, name):
    argv = [*video_run, *options(COVERING[name])]
    unbroken = train_video(argv)
    assert losses_of(unbroken) != plain_losses(COVERING[name])  # the options do something
    assert_resumes(train_video, argv, unbroken)
    assert_splits(train_video, argv, unbroken, 2)


def test_validation_mixes_with_noise_as_training_does(video_run, monkeypatch):
    """At the noise levels that the model is used at: this one as the expert of high noise."""
    monkeypatch.setattr(Wan, "noise_range", (0.9, 1.0))
    fields = options({"noise.frame_correlation": "mixed", "data.validation_dataset": None})
    config = command_line.parse_config(TextToVideoConfig, last_wins([*video_run, *fields]))
    forget_accelerator()
    of_batch = next(fixed_triples(Accelerator(cpu=True), load_family(config), map_rows(config.data), config))
    assert of_batch.timesteps.min() >= 900
    _, sigmas = Schedule("linear", "flow_prediction").alphas_and_sigmas(
        append_dims(of_batch.timesteps, of_batch.target)
    )
    noise = of_batch.noisy_latents + (1 - sigmas) * of_batch.target  # of x = (1 - σ)·x_0 + σ·ε and u = ε - x_0
    seed, shape = config.evaluation.seed, noise.shape[1:]
    expected = unit_noise(config.noise, seed, "validation_noise", of_batch.keys, shape)
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        noise, unit_noise(NoiseConfig(), seed, "validation_noise", of_batch.keys, shape), atol=0.1
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise.frame_correlation_strength": 2.0}, "noise.frame_correlation_strength: goes with noise.frame_correl"),
        (
            {"noise.frame_correlation": "mixed", "noise.frame_correlation_strength": 0.0},
            "noise.frame_correlation_strength: must be above 0, got 0.0",
        ),
        (
            {"noise.frame_correlation": "mixed", "noise.pyramid_discount": 0.5},
            "noise.frame_correlation: goes without noise.pyramid_discount, .*, got 'mixed'",
        ),
        ({"scheduler.flow_shift": 2.0, "scheduler.flow_base_resolution": 64}, "scheduler.flow_base_resolution: is of"),
        ({"data.mask_column": "mask"}, "--data.mask_column: no such field"),
        (
            {"noise.frame_correlation": "mixed", "data.num_frames": 1},
            r"noise.frame_correlation: needs clips of several frames, .* data.buckets\), got 'mixed'$",
        ),
        (
            {"model.first_frame_probability": 0.5, "data.buckets": [[1, 32, 32], [1, 32, 64]]},
            "model.first_frame_probability: needs clips of several frames, .*, got 0.5$",
        ),
    ],
)
def test_what_is_not_for_clips_is_refused_as_the_config_loads(video_run, fields, message):
    with pytest.raises(InputError, match=message):
        command_line.parse_config(TextToVideoConfig, last_wins([*video_run, *options(fields)]))


@pytest.mark.slow
def test_a_shorter_quickstart_learns(tmp_path):
    """By its loss on clips that it is not trained on, which is 1 where nothing is known."""
    fields = {"train.max_steps": 300, "train.eval_every": 300, "train.save_every": 0, "train.cpu_threads": 1}
    fields |= {"train.output_dir": tmp_path / "run", "data.cache_dir": tmp_path / "cache"}
    run = train_video(["--config", str(ROOT / "configs/quickstart_video.yaml"), *options(fields)])
    assert metrics_without_times(run)[-1]["validation_loss"] < 0.65
