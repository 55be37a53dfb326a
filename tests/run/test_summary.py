"""What is said before the first step."""

import importlib
import re

import pytest
from accelerate import Accelerator
from helpers import CACHES, metrics_without_times, options, parse_config, train

from difftrain_utils.data.load import load_data
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.run import memory, summary


@pytest.fixture
def describe(monkeypatch):
    """The summary of a config, by its labels, at 80 columns, and with the memory that the suite leaves out."""
    monkeypatch.setattr(summary, "summarise_memory", memory.summarise_memory)
    monkeypatch.setenv("COLUMNS", "80")

    def describe(argv, checkpoint=None, num_processes=1):
        config = parse_config(argv)
        accelerator = Accelerator(cpu=True)
        family = load_family(config)
        models = trained_models(family, config)
        optimizer, data = build_optimizer(config.optimizer, models), load_data(accelerator, family, config)
        text = summary.describe_run(accelerator, family, models, optimizer, data, checkpoint, config)
        longest = max(map(len, text.split()))  # a path is not broken
        assert all(len(line) <= max(80, longest + summary.LABEL) for line in text.splitlines())
        joined = text.replace("\n" + " " * summary.LABEL, " ")
        return {line.split()[0]: line[summary.LABEL :] for line in joined.splitlines()}

    return describe


def test_of_a_whole_model(describe, short_run):
    said = describe(short_run)
    assert list(said) == ["model", "data", "batch", "steps", "device", "memory", "output", "resume"]
    assert "(StableDiffusionPipeline): all 262 k parameters of unet are trained" in said["model"]
    assert said["data"].endswith("shapes: 10 images, 32x32 pixels")
    assert said["batch"] == "4 samples"
    assert said["steps"] == "6, 2.4 epochs of 10 samples"
    assert said["device"] == "cpu (1 thread), fp32"
    assert re.match(r"0\.00\d+ GB a step \(largest: optimizer state 0\.00", said["memory"])
    assert said["output"].endswith(": a checkpoint every 2 steps")
    assert said["resume"] == "the same command with --resume-from latest"


def test_of_adapters_parts_caches_and_buckets(describe, short_run, tmp_path):
    fields = {"model.lora.rank": 2, "train.gradient_accumulation_steps": 2, "data.validation_split": 0.2}
    said = describe(
        [*short_run, *options(fields | CACHES | {"data.buckets": [[32, 32]]})], checkpoint=tmp_path / "checkpoint-4"
    )
    assert said["model"].endswith(": 4.61 k of 266 k parameters of unet are trained, adapters of rank 2")
    assert " held out, 1 size of about 32x32 pixels; cached: latents and text" in said["data"]
    assert said["batch"] == "4 samples = 2 parts x 2"
    assert said["steps"].startswith("4 to 6, ")


def test_before_the_first_step_and_no_stage_is_silent(short_run, capsys):
    importlib.import_module("train_text_to_image")
    train(short_run)
    lines = capsys.readouterr().out.splitlines()
    stages = [line for line in lines if line.endswith(" ...")]
    assert [stage.split()[0] for stage in stages] == ["Loading", "Loading", "Opening", "Checking"]
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert lines.index(stages[-1]) < [line[:6] for line in lines].index("model ") < first_step
    assert lines[first_step].startswith("step 1/6, epoch 0.4, loss ")
    assert lines[first_step].endswith(" left") and " samples/s, " in lines[first_step]


def test_what_an_evaluation_finds_is_said(short_run, capsys):
    fields = {"data.validation_split": 0.2, "evaluation.num_validation_bins": 2, "train.eval_every": 3}
    entries = metrics_without_times(train([*short_run, *options(fields), "--train.log_every", "2"]))
    found = {entry["step"]: entry["validation_loss_ema"] for entry in entries if "validation_loss_ema" in entry}
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+:", line)]
    assert lines == [f"step {step}: validation_loss_ema {loss:.3g}" for step, loss in found.items()]
    assert list(found) == [3, 6]


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1000, "1 k"), (1_234_567, "1.23 M"), (2_567_000_000, "2.57 B")]
)
def test_counts(number, text):
    assert summary.count(number) == text
