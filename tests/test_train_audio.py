"""train_text_to_audio.py keeps the promises of the image script, and trains all strategies on sounds."""

import errno
import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from helpers import (
    AUDIO_SCRIPT,
    assert_resumes,
    assert_shared_out,
    assert_splits,
    assert_survives_a_kill,
    forget_accelerator,
    last_wins,
    launch_two,
    losses_of,
    metrics_without_times,
    options,
    reproduce,
    train_audio,
    weights_of,
)
from safetensors.torch import load_file

from difftrain_utils.builtins.tones import make_tone
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.data.load import load_data
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.families.load import load_family
from difftrain_utils.media import audio
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.noise import sample_noise
from difftrain_utils.objective.timesteps import sample_timesteps

LENGTH, NUM_SOUNDS = 1024, 12
WINDOWS = {"data.window": "all"}
CACHES = WINDOWS | {"data.cache_latents": True, "data.cache_text": True}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Tones in a folder, of 0.15 to 0.7 s, at another rate than the model's; three are shorter than a window."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(NUM_SOUNDS):
            samples, caption = make_tone(i, 1200 + 400 * i, 8000)
            soundfile.write(folder / f"{i}.flac", samples, 8000, subtype="PCM_16")
            lines.write(json.dumps({"file_name": f"{i}.flac", "text": caption}) + "\n")
    return folder


@pytest.fixture
def audio_run(sounds, tmp_path) -> list[str]:
    return short_options(sounds, tmp_path / "run")


def short_options(sounds: Path, output_dir: Path) -> list[str]:
    """Options of a run of seconds."""
    return options(
        {
            "model.pretrained_model_name_or_path": "builtin:tiny-stable-audio",
            "data.dataset": sounds,
            "data.validation_dataset": sounds,
            "data.waveform_length": LENGTH,
            "data.sampling_rate": 4000,
            "data.audio_channels": 1,
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


def config_of(argv: list[str]) -> TextToAudioConfig:
    return command_line.parse_config(TextToAudioConfig, last_wins(argv))


def test_a_run_is_the_same_twice_resumed_and_split(audio_run, tmp_path):
    """With windows at random; evaluating changes nothing, and plain diffusers loads what is exported."""
    evaluated = options({"train.eval_every": 4, "evaluation.prompts": ["a low tone", "a rising tone"]})
    unbroken = train_audio([*audio_run, *evaluated])
    again = train_audio([*audio_run, "--output-dir", str(tmp_path / "again")])
    assert weights_of(again) == weights_of(unbroken)
    metrics = metrics_without_times(unbroken)
    evaluations = [{name: entry.pop(name) for name in [*entry] if name.startswith("validation")} for entry in metrics]
    assert metrics_without_times(again) == metrics
    assert 0 < evaluations[3]["validation_loss_ema"] < 10 and len(evaluations[3]["validation_loss_bins"]) == 8
    names = {path.name for path in (unbroken / "samples").iterdir()}
    assert names == {"step-000004.png", "step-000004-00.wav", "step-000004-01.wav"}
    assert_resumes(train_audio, [*audio_run, *evaluated], unbroken)
    assert_splits(train_audio, audio_run, unbroken, 2, 4)
    ema, pipeline = load_file(unbroken / "checkpoint-4/ema.safetensors"), unbroken / "pipeline"
    parameters = DiffusionPipeline.from_pretrained(pipeline).transformer.parameters()
    trained = [parameter for parameter in parameters if parameter.requires_grad]  # all but the time's frequencies
    assert len(ema) == len(trained) and all(parameter.equal(ema[str(i)]) for i, parameter in enumerate(trained))


def test_samples_that_cannot_be_written_end_no_run(audio_run, monkeypatch, capsys):
    """Neither the sounds nor, after them, their picture."""
    evaluated = options({"train.max_steps": 1, "train.eval_every": 1, "evaluation.prompts": ["a low tone"]})

    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(audio, "labelled_grid", fail)
    samples = train_audio([*audio_run, *evaluated]) / "samples"
    assert [path.name for path in samples.iterdir()] == ["step-000001-00.wav"]
    assert f"cannot write {samples}/step-000001.png: No space left on device; training goes" in capsys.readouterr().err


@torch.no_grad()
def test_what_is_beside_a_sound_in_a_batch_does_not_change_its_loss(audio_run):
    """The short ones are padded to a length that is not the batch's."""
    forget_accelerator()
    config = config_of(audio_run)
    family = load_family(config)
    denoiser, schedule = family.load_denoiser().eval(), family.schedule
    samples = Samples(load_data(Accelerator(cpu=True), family, config), config.data, 0, NUM_SOUNDS)

    def losses(keys: list[int]) -> torch.Tensor:
        batch = collate([samples[k] for k in keys])
        latents, conditioning = family.encode(batch, 0)
        noise = sample_noise(config.noise, 0, keys, latents, batch["conditions"])
        timesteps = sample_timesteps(config.timesteps, schedule, 0, keys, NUM_SOUNDS)
        output = family.predict(denoiser, schedule.add_noise(latents, noise, timesteps), timesteps, conditioning)
        target = schedule.target(latents, noise, timesteps)
        return sample_losses(config.loss, schedule, output, target, timesteps, batch["masks"])

    masks = torch.stack([samples[k]["mask"] for k in range(NUM_SOUNDS)])
    is_short = masks.flatten(1).min(1).values == 0
    assert is_short.sum() == 3
    together, alone = losses(range(NUM_SOUNDS)), torch.cat([losses([k]) for k in range(NUM_SOUNDS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    config.data.mask_padding = False
    assert torch.equal(losses(range(NUM_SOUNDS)).isclose(together, rtol=1e-3), ~is_short)


VARIANTS = {
    "cached": CACHES | {"data.num_workers": 1, "train.gradient_checkpointing": True, "train.eval_every": 2},
    "adapters": {"model.lora.rank": 4, "model.lora.merge": True, "data.window": "middle", "data.peak": 0.5},
    "stream": {"data.streaming": True, "data.shuffle_buffer": 4, "data.lanes": 4, "data.mask_padding": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_so_are_other_runs(audio_run, fields):
    argv = [*audio_run, *options(fields)]
    unbroken = train_audio(argv)
    assert_resumes(train_audio, argv, unbroken)
    assert_splits(train_audio, argv, unbroken, 4)


@pytest.mark.slow
def test_caches_change_nothing(audio_run, tmp_path):
    """Neither the windows' moments nor the captions' states, in training and validation."""
    fields, runs = {"train.max_steps": 2, "train.eval_every": 2, "train.save_every": 0}, []
    for name, caches in (("plain", WINDOWS), ("cached", CACHES)):
        runs.append(train_audio([*audio_run, *options(fields | caches | {"train.output_dir": tmp_path / name})]))
    plain, cached = (losses_of(run, "validation_loss", "validation_loss_ema") for run in runs)
    assert len(plain) == 4 and cached == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shards"), [("stable-audio", ["none"]), ("stable-audio-3", ["none", "full"]), ("ace-step", ["none"])]
)  # the others shared out: below, and tests/families/test_ace_step.py
def test_two_processes_train_as_one(audio_run, tmp_path, model, shards):
    """Also where one asks the denoiser more often than the other before it goes back: that of ACE-Step, with captions
    of more lengths."""
    argv = [*audio_run, *options({"model.pretrained_model_name_or_path": f"builtin:tiny-{model}"})]
    argv += ["--train.save_every", "0"]
    alone = train_audio([*argv, "--output-dir", str(tmp_path / "alone")])
    for shard in shards:
        two = ["--train.shard", shard, "--output-dir", str(tmp_path / shard)]
        launch_two([*argv, *two], script=AUDIO_SCRIPT).check_returncode()
        assert losses_of(tmp_path / shard, "grad_norm") == pytest.approx(losses_of(alone, "grad_norm"), rel=1e-5)


@pytest.mark.slow
def test_what_two_processes_share_out_they_resume_and_so_does_one(audio_run, tmp_path):
    argv = [*audio_run, *options({"evaluation.prompts": ["a low tone", "low noise"]})]
    assert_shared_out(train_audio, argv, AUDIO_SCRIPT, tmp_path)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(audio_run, tmp_path):
    argv = [*audio_run, *options({"train.max_steps": 20, "train.save_every": 4})]
    assert len(assert_survives_a_kill(train_audio, argv, AUDIO_SCRIPT, tmp_path, after=9)) == 2


@pytest.mark.slow
def test_reproduce_finds_the_same_bits(audio_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", [str(AUDIO_SCRIPT)])  # what runs in this process record as their command
    run = train_audio([*audio_run, "--train.eval_every", "4"])
    assert reproduce(run, tmp_path / "again", monkeypatch) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("bit-identical: ")


# ── Strategies ───────────────────────────────────────────────────────────────────────────────────────────────
COVERING = {
    "dream-logit-normal-debiased": {
        "strategy.dream_training": True,
        "strategy.dream_start_step": 1,
        "timesteps.density": "logit_normal",
        "loss.weighting": "debiased",
        "loss.type": "huber",
        "loss.huber_schedule": "snr",
    },
    "dream-half-perturbed-stratified-sigma-sqrt": {
        "strategy.dream_training": True,
        "strategy.dream_probability": 0.5,
        "noise.input_perturbation": 0.1,
        "timesteps.stratified": True,
        "loss.weighting": "sigma_sqrt",
    },
    "pyramid-offset-mode-soft-min-snr": {
        "noise.pyramid_discount": 0.8,
        "noise.offset": 0.1,
        "timesteps.density": "mode",
        "loss.weighting": "soft_min_snr",
        "loss.type": "l1",
    },
    "edm-learned-uncertainty": {
        "loss.learned_uncertainty": True,
        "loss.weighting": "edm",
        "loss.edm_sigma_data": 1.0,
        "timesteps.density": "log_normal",
        "timesteps.p_mean": -0.5,
        "train.eval_every": 2,
    },
    "nearest-table-p2": {
        "noise.pairing": "nearest",
        "train.group_size": 2,
        "timesteps.density": "table",
        "timesteps.table": [1.0, 2.0, 1.0],
        "loss.weighting": "p2",
        "loss.type": "smooth_l1",
        "loss.huber_schedule": "exponential",
    },
    "transport-contrastive-min-snr": {
        "noise.pairing": "transport",
        "loss.contrastive": 0.05,
        "data.caption_dropout": 0.5,
        "train.group_size": 2,
        "loss.weighting": "min_snr",
        **CACHES,
    },
    "knn-contrastive-snr": {
        "noise.pairing": "knn",
        "noise.knn_candidates": 3,
        "loss.contrastive": 0.05,
        "train.group_size": 2,
        "loss.weighting": "snr",
    },
    "cosmap-range-flow": {
        "timesteps.density": "cosmap",
        "timesteps.min": 0.1,
        "timesteps.max": 0.9,
        "loss.weighting": "flow",
        "ema.power_sigma_rels": [0.1],
    },
    "all-of-noise-cosmap": {
        "noise.pairing": "knn",
        "noise.pyramid_discount": 0.8,
        "noise.input_perturbation": 0.1,
        "strategy.dream_training": True,
        "loss.weighting": "cosmap",
        "data.mask_padding": False,
    },
}


@pytest.fixture(scope="module")
def plain_losses(sounds, tmp_path_factory) -> list[float]:
    """Those of the same model without any strategy."""
    argv = short_options(sounds, tmp_path_factory.mktemp("runs") / "plain")
    return losses_of(train_audio([*argv, "--train.save_every", "0"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERING)
def test_strategies_train_resume_and_split_exactly(audio_run, plain_losses, name):
    argv = [*audio_run, *options(COVERING[name])]
    unbroken = train_audio(argv)
    assert losses_of(unbroken) != plain_losses  # the options do something
    assert_resumes(train_audio, argv, unbroken)
    assert_splits(train_audio, argv, unbroken, 2)
