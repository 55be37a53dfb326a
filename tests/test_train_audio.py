"""train_text_to_audio.py keeps the promises of the image script."""

import json
from pathlib import Path

import pytest
import soundfile
from helpers import AUDIO_SCRIPT, launch_two, metrics_without_times, options, pipeline_bytes, train_audio

from difftrain_utils.builtins.tones import make_tone

pytestmark = pytest.mark.slow
CACHED = {"data.window": "all", "data.cache_latents": True, "data.cache_text": True}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Twelve tones in a folder, of 0.6 to 1.7 s, at another rate than the model's; some are shorter than a window."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(12):
            samples, caption = make_tone(i, 4800 + 800 * i, 8000)
            soundfile.write(folder / f"{i}.flac", samples, 8000, subtype="PCM_16")
            lines.write(json.dumps({"file_name": f"{i}.flac", "text": caption}) + "\n")
    return folder


@pytest.fixture
def audio_run(sounds, tmp_path) -> list[str]:
    """Options of a run of seconds."""
    data = {"dataset": sounds, "validation_dataset": sounds, "cache_dir": tmp_path / "cache", "caption_dropout": 0.2}
    data |= {"waveform_length": 4096, "sampling_rate": 4000, "audio_channels": 1}
    train = {"output_dir": tmp_path / "run", "max_steps": 4, "batch_size": 4, "cpu_threads": 1, "log_every": 1}
    train |= {"save_every": 2, "eval_every": 2, "keep_checkpoints": 0}
    evaluation = {"prompts": ["a low tone", "a rising tone"], "num_inference_steps": 2, "num_validation_samples": 8}
    sections = {"data": data, "train": train, "evaluation": evaluation}
    fields = {f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()}
    return options({"model.pretrained_model_name_or_path": "builtin:tiny-stable-audio"} | fields)


def losses_of(run: Path) -> list[float]:
    return [metrics["loss"] for metrics in metrics_without_times(run)]


@pytest.mark.parametrize("fields", [{}, CACHED], ids=["plain", "cached"])
def test_it_trains_evaluates_and_resumes_exactly(audio_run, tmp_path, fields):
    argv = [*audio_run, *options(fields)]
    unbroken = train_audio(argv)
    names = {path.name for path in (unbroken / "samples").iterdir()}
    assert names == {f"step-00000{step}{end}" for step in (2, 4) for end in (".png", "-00.wav", "-01.wav")}
    metrics = metrics_without_times(unbroken)
    assert "validation_loss" in metrics[-1] and len(metrics) == 4
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    train_audio([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics[2:]


def test_parts_and_caches_change_nothing_but_rounding(audio_run, tmp_path):
    window = {"data.window": "all", "train.eval_every": 0}
    plain = losses_of(train_audio([*audio_run, *options(window)]))
    for name, fields in {"parts": {"train.gradient_accumulation_steps": 4}, "cached": CACHED}.items():
        run = train_audio([*audio_run, *options(window | fields | {"train.output_dir": tmp_path / name})])
        assert losses_of(run) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_train_the_same(audio_run, tmp_path, shard):
    argv = [*audio_run, *options({"train.shard": shard})]
    launch_two(argv, script=AUDIO_SCRIPT).check_returncode()
    alone = train_audio([*audio_run, "--train.output_dir", str(tmp_path / "alone")])
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(alone), rel=1e-5)
    last, other = (metrics_without_times(run)[-1] for run in (tmp_path / "run", alone))
    assert last["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
