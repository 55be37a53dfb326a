"""The length of a run in epochs, which is `train.max_steps` in other words."""

import pytest
import yaml
from helpers import BUCKETS, assert_one_line, metrics_without_times, options, parse_config, pipeline_bytes, train

from difftrain_utils.commands import validate_config
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError
from difftrain_utils.run.run_folder import CONFIG_FILE, list_checkpoints, read_manifest
from difftrain_utils.terminal import STOPPED

EPOCHS = {"train.max_steps": None, "data.epochs": 1.5}  # of ten images, four a step: 3.75 steps


@pytest.mark.parametrize(
    ("epochs", "samples", "batch_size", "steps"),
    [(1.5, 10, 4, 4), (2.0, 10, 4, 5), (0.1, 30, 1, 3), (0.1, 10, 4, 1), (3.3, 10, 11, 3), (1e-9, 10, 4, 1)],
)
def test_the_last_step_is_full(epochs, samples, batch_size, steps):
    assert TrainConfig(batch_size=batch_size).steps_of(epochs, samples) == steps


def test_epochs_are_a_number_of_steps_and_nothing_else(short_run, tmp_path, capsys):
    """So a run by epochs stops, resumes and is extended to the bytes of one by steps, with its learning rate."""
    by_steps = train([*short_run, "--output-dir", str(tmp_path / "steps"), "--train.max_steps", "4"])
    argv = [*short_run, *options(EPOCHS)]
    run = train(argv)
    assert metrics_without_times(run) == metrics_without_times(by_steps)
    assert pipeline_bytes(run) == pipeline_bytes(by_steps)
    resolved = yaml.safe_load((run / CONFIG_FILE).read_text())
    assert (resolved["train"]["max_steps"], resolved["data"]["epochs"]) == (4, None)
    assert parse_config(["--config", str(run / CONFIG_FILE)]).train.max_steps == 4
    assert read_manifest(run)["samples_per_epoch"] == 10

    capsys.readouterr()
    before = (run / "run_manifest.json").read_bytes()
    train([*argv, "--resume-from", "latest"])  # the same command again
    assert "Nothing to do: " in capsys.readouterr().out and (run / "run_manifest.json").read_bytes() == before
    assert_one_line([*argv, "--resume-from", "latest", "--data.epochs", "1"],
                    r"train.resume_from: .*checkpoint-4 is past train.max_steps, which is 3$", capsys)  # fmt: skip
    train([*argv, "--resume-from", "latest", "--data.epochs", "2.1"])
    assert [step for step, _ in list_checkpoints(run)] == [4, 6]
    assert read_manifest(run)["segments"][1]["differs"] == {}


def test_a_run_by_epochs_that_was_stopped_goes_on_to_the_same_bytes(short_run, tmp_path):
    unbroken = train([*short_run, *options(EPOCHS), "--output-dir", str(tmp_path / "unbroken")])
    argv = [*short_run, *options(EPOCHS)]
    train([*argv, "--train.max_hours", "1e-9"], exit_code=STOPPED)
    run = train([*argv, "--resume-from", "latest"])
    assert len(read_manifest(run)["segments"]) == 2
    assert metrics_without_times(run) == metrics_without_times(unbroken)
    assert pipeline_bytes(run) == pipeline_bytes(unbroken)


def test_an_epoch_of_buckets_leaves_out_what_makes_no_batch(short_run, mixed_folder):
    """7 and 14 images of a size: four whole batches of four."""
    fields = BUCKETS | EPOCHS | {"data.dataset": mixed_folder, "data.epochs": 1, "train.save_every": 0}
    run = train([*short_run, *options(fields)])
    assert read_manifest(run)["samples_per_epoch"] == 16
    assert [step for step, _ in list_checkpoints(run)] == [4]


def test_validate_config_counts_them_too(short_run, tmp_path):
    validate_config.main([arg for arg in short_run if arg not in ("--train.max_steps", "6")] + ["--data.epochs", "3"])
    assert yaml.safe_load((tmp_path / "run" / CONFIG_FILE).read_text())["train"]["max_steps"] == 8


def test_without_either_it_is_a_thousand_steps():
    required = ["--model.pretrained_model_name_or_path", "m", "--data.dataset", "d"]
    assert parse_config(required).train.max_steps == 1000
    assert parse_config([*required, "--data.epochs", "2"]).train.max_steps is None


def test_on_the_command_line_one_takes_the_place_of_the_other_in_a_file(tmp_path):
    required = [
        "--model.pretrained_model_name_or_path",
        "m",
        "--data.dataset",
        "d",
        "--config",
        str(tmp_path / "c.yaml"),
    ]
    (tmp_path / "c.yaml").write_text("train: {max_steps: 5}")
    config = parse_config([*required, "--data.epochs=2"])
    assert (config.data.epochs, config.train.max_steps) == (2, None)
    (tmp_path / "c.yaml").write_text("data: {epochs: 5}")
    config = parse_config([*required, "--train.max_steps", "7"])
    assert (config.data.epochs, config.train.max_steps) == (None, 7)
    assert parse_config([*required, "--train.max_steps", "null"]).data.epochs == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.epochs": 2, "train.max_steps": 9},
         "data.epochs: is train.max_steps in other words, which is 9: give null for one of them, got 2.0"),
        ({"data.epochs": 0}, "data.epochs: must be above 0, or null, got 0.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    required = {"model.pretrained_model_name_or_path": "m", "data.dataset": "d"}
    with pytest.raises(InputError) as refused:
        parse_config(options(required | fields))
    assert str(refused.value).startswith(message)


def test_more_steps_than_can_be_counted_are_refused(short_run, capsys):
    argv = [*short_run, *options(EPOCHS), "--data.epochs", "1e18"]
    assert_one_line(argv, r"train.max_steps: times train.batch_size, 4, must be below 2\^63, got", capsys)
