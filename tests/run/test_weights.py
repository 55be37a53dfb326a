"""Files of the trained weights alone: which steps have one, what is in it, and which is the best."""

import json
import math

import pytest
import torch
from helpers import assert_one_line, metrics_without_times, options, parse_config, pipeline_bytes, short_options, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain_utils.config.training import BEST_IS
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.trained import trained_weights
from difftrain_utils.run.weights import is_best, load_weights
from difftrain_utils.terminal import STOPPED

WEIGHTS = {"train.save_weights_every": 2, "train.eval_every": 1, "data.validation_split": 0.3}
BEST = WEIGHTS | {"train.keep_best": "validation_loss", "train.save_every": 1, "train.keep_checkpoints": 0}
LORA = {"model.lora.rank": 2, "model.train_text_encoder": True}


def bytes_of(run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "weights").iterdir()}


def about(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["weights"])


@pytest.fixture(scope="module")
def best_run(checkpoint_folder, image_folder, tmp_path_factory):
    """An unbroken run, at a rate at which its validation loss rises and falls."""
    folder = tmp_path_factory.mktemp("best") / "run"
    argv = [*short_options(checkpoint_folder, image_folder, folder), *options(BEST)]
    return argv, train([*argv, "--optimizer.init_args.lr", "0.02"])


def test_weights_are_those_of_the_checkpoints(best_run):
    _, run = best_run
    assert set(bytes_of(run)) == {f"step-00000{step}.safetensors" for step in (2, 4, 6)} | {"best.safetensors"}
    for step in (4, 6):
        weights = load_file(run / f"weights/step-00000{step}.safetensors")
        raw, ema = (load_file(run / f"checkpoint-{step}/{name}.safetensors") for name in ("denoiser", "ema"))
        assert list(sorted(weights)) == sorted(f"denoiser.{name}" for name in raw)
        denoiser = trained_models(load_family(parse_config(best_run[0])), parse_config(best_run[0]))["denoiser"]
        for i, name in enumerate(trained_weights(denoiser)):
            assert torch.equal(weights[f"denoiser.{name}"], ema[str(i)])
        assert about(run / f"weights/step-00000{step}.safetensors") == {"step": step, "weights": "ema"}


def test_the_best_is_of_the_lowest_validation_loss(best_run):
    """And of the raw weights, which this metric is of."""
    _, run = best_run
    losses = {entry["step"]: entry["validation_loss"] for entry in metrics_without_times(run)}
    step = min(losses, key=losses.get)
    assert step not in (1, 6), losses  # else the test would say little
    assert about(run / "weights/best.safetensors") == {
        "step": step, "metric": "validation_loss", "value": losses[step], "weights": "raw",
    }  # fmt: skip
    raw, best = (
        load_file(run / name) for name in (f"checkpoint-{step}/denoiser.safetensors", "weights/best.safetensors")
    )
    assert all(torch.equal(best[f"denoiser.{name}"], value) for name, value in raw.items())


def test_a_run_that_resumes_keeps_the_same_bytes(best_run, tmp_path, capsys):
    argv, unbroken = best_run
    argv = [*argv, "--optimizer.init_args.lr", "0.02", "--output-dir", str(tmp_path / "run")]
    for _ in range(5):
        train([*argv, "--resume-from", "latest", "--train.max_hours", "1e-9"], exit_code=STOPPED)
    run = train([*argv, "--resume-from", "latest"])
    assert bytes_of(run) == bytes_of(unbroken) and pipeline_bytes(run) == pipeline_bytes(unbroken)
    step = about(run / "weights/best.safetensors")["step"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Done: ")]
    assert f"weights/best.safetensors holds the weights of step {step} (validation_loss 0." in printed[0]


def test_adapters_are_kept_alone_and_read_back(short_run):
    argv = [*short_run, *options(LORA | {"train.save_weights_every": 3, "train.max_steps": 3})]
    run = train([*argv, "--ema.enabled", "false"])
    config = parse_config(argv)
    models = trained_models(load_family(config), config)
    path = run / "weights/step-000003.safetensors"
    assert load_weights(path, models["denoiser"], models["text_encoders"]) == {"step": 3, "weights": "raw"}
    for part in ("denoiser", "text_encoders"):
        saved = load_file(run / f"checkpoint-3/{part}.safetensors")
        assert all(torch.equal(saved[name], value) for name, value in trained_weights(models[part]).items())
        assert all(".lora_" in name for name in saved)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    model, path = torch.nn.Linear(2, 3), tmp_path / "weights.safetensors"
    of_run = {"weights": json.dumps({"step": 1, "weights": "raw"})}
    for tensors, metadata, message in [
        (
            {"denoiser.weight": torch.zeros(3, 2)},
            of_run,
            r"is of other models: denoiser.bias is not there, and here \(3,",
        ),
        (
            {"denoiser.weight": torch.zeros(2, 2), "denoiser.bias": torch.zeros(3)},
            of_run,
            r"weight is \(2, 2\), and here",
        ),
        ({"unet.weight": torch.zeros(3, 2)}, of_run, "is of other models: denoiser.bias is not there"),
        ({}, None, "no weights of a run, of which the metadata tells"),
        ({}, {"weights": "{}"}, "no weights of a run, of which the metadata tells"),
    ]:
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match=message) as refused:
            load_weights(path, model)
        assert str(refused.value).startswith(f"{path}: ")
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"weights.safetensors: "):
        load_weights(path, model)
    with pytest.raises(InputError, match="No such file"):
        load_weights(tmp_path / "none.safetensors", model)


@pytest.mark.parametrize(
    ("metric", "before", "value", "expected"),
    [
        ("fid", [], 9.0, True),
        ("fid", [3.0, 2.0], 1.0, True),
        ("fid", [3.0, 1.0], 1.0, False),  # the first of two as good is kept
        ("fid", [3.0, 1.0], 2.0, False),
        ("clip_score", [3.0, 1.0], 4.0, True),
        ("clip_score", [3.0, 5.0], 4.0, False),
        ("fid", [math.nan, 3.0], 2.0, True),
        ("fid", [], math.nan, False),
        ("clip_score", [], math.inf, False),
    ],
)
def test_which_is_the_best(tmp_path, metric, before, value, expected):
    values = [*before, value, -1e9 if BEST_IS[metric] == "lowest" else 1e9]  # that of a later step does not count
    lines = [json.dumps({"step": step, metric: v}) + "\n" for step, v in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + "".join(lines))
    assert is_best(tmp_path, len(before), metric, value) is expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.keep_best": "loss"}, r"train.keep_best: must be one of validation_loss, .*, or null, got 'loss'"),
        (
            {"train.keep_best": "fid"},
            r"train.keep_best: needs evaluation.fid_features, and train.eval_every above 0, got",
        ),
        (BEST | {"train.eval_every": 0}, r"train.keep_best: needs data.validation_split or .*, and train.eval_every"),
        (
            BEST | {"ema.enabled": False, "train.keep_best": "validation_loss_ema"},
            r"train.keep_best: needs .* ema.enabled",
        ),
        ({"train.save_weights_every": -1}, r"train.save_weights_every: must be 0 or more, got -1"),
    ],
)
def test_what_is_not_evaluated_is_refused_before_anything_is_written(short_run, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        parse_config([*short_run, *options(fields)])


def test_another_metric_makes_another_run(best_run, capsys):
    argv = [*best_run[0], "--optimizer.init_args.lr", "0.02", "--resume-from", "latest"]
    message = (
        r"train.resume_from: .* is of another run: train.keep_best was 'validation_loss' and is None; to branch off"
    )
    assert_one_line([*argv, "--train.keep_best", "null"], message, capsys)
    run = train([*argv, "--train.save_weights_every", "0"])  # may change, as where the run ended
    assert set(bytes_of(run)) > {"best.safetensors"}
