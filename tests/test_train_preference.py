"""train_preference.py keeps the promises of the image script, and learns what is preferred."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import (
    CACHES,
    PREFERENCE_SCRIPT,
    launch_two,
    metrics_without_times,
    options,
    pipeline_bytes,
    short_options,
    train_preference,
    without_dropout,
)

from difftrain_utils.builtins.shapes import draw_pair
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.errors import InputError
from difftrain_utils.run.run_folder import read_about_weights

BETA = 100.0
ROUNDING = BETA * 1e-7  # of a margin, which is β/2 times a difference of errors of about 1
LORA = {"model.lora.rank": 4, "model.lora.merge": True, "optimizer.init_args.lr": 1e-2}
VARIANTS = {
    "full": {"noise.offset": 0.1, "loss.weighting": "min_snr"},
    "lora": LORA | CACHES,
    "some": {
        "model.prediction_type": "flow_prediction",
        "model.trainable": ["*attn*"],
        "noise.input_perturbation": 0.1,
    },
}
MEASURES = ("implicit_accuracy", "margin")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Ten pairs of shapes in a folder."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(10):
            *images, caption = draw_pair(i, 36)
            names = [f"{i}-{column}.png" for column in ("chosen", "rejected")]
            for image, name in zip(images, names, strict=True):
                image.save(folder / name)
            row = {"chosen_file_name": names[0], "rejected_file_name": names[1], "text": caption}
            lines.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def pairs_run(checkpoint_folder, pairs, tmp_path) -> list[str]:
    """Options of a run of seconds."""
    fields = {
        "data.validation_dataset": pairs,
        "data.cache_dir": tmp_path / "cache",
        "preference.beta": BETA,
        "train.eval_every": 3,
        "train.keep_checkpoints": 0,
    }
    return [*short_options(checkpoint_folder, pairs, tmp_path / "run"), *options(fields)]


@pytest.mark.parametrize(
    "fields", [pytest.param(f, marks=[pytest.mark.slow] if n == "some" else [], id=n) for n, f in VARIANTS.items()]
)
def test_it_trains_evaluates_and_resumes_exactly(pairs_run, tmp_path, fields):
    best = "validation_implicit_accuracy"
    argv = [*pairs_run, *options(fields | {"train.keep_best": best})]
    unbroken = train_preference(argv)
    metrics = metrics_without_times(unbroken)
    assert metrics[0].keys() > {"loss", *MEASURES} and all(0 <= m["implicit_accuracy"] <= 1 for m in metrics)
    last = metrics[-1]
    for name in ("loss", *MEASURES):
        assert last[f"validation_{name}"] == pytest.approx(sum(last[f"validation_{name}_bins"]) / 8, abs=1e-9)
        assert f"validation_{name}_ema" in last
    about = read_about_weights(unbroken / "weights/best.safetensors")
    assert about["weights"] == "raw" and about["value"] == max(m[best] for m in metrics if best in m)
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-4")]
    train_preference([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics[4:]


def test_it_begins_at_the_reference(pairs_run, tmp_path):
    """Without dropout, and in bf16, too, where what both compute is rounded in the same way."""
    start = {
        "model.pretrained_model_name_or_path": without_dropout(pairs_run, tmp_path),
        "train.max_steps": 1,
        "train.eval_every": 0,
    }
    for name, fields in (VARIANTS | {"bf16": {"train.precision": "bf16"}}).items():
        run = train_preference([*pairs_run, *options(start | fields | {"train.output_dir": tmp_path / name})])
        (metrics,) = metrics_without_times(run)
        assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-7)
        assert (metrics["margin"], metrics["implicit_accuracy"]) == (0, 0.5) and metrics["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "dit", "pixel"])
def test_so_it_does_with_other_families(pairs_run, tmp_path, family):
    fields = {"model.pretrained_model_name_or_path": f"builtin:tiny-{family}", "train.max_steps": 1}
    fields |= {"train.eval_every": 0} | ({"model.max_sequence_length": 24} if family in ("sd3", "flux") else {})
    fields |= {"model.lora.rank": 4} if family == "flux" else {}
    (metrics,) = metrics_without_times(train_preference([*pairs_run, *options(fields)]))
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-7) and metrics["margin"] == 0


def losses_of(run) -> list[tuple[float, ...]]:
    return [tuple(entry[name] for name in ("loss", *MEASURES)) for entry in metrics_without_times(run)]


def test_parts_of_a_batch_have_the_same_losses(pairs_run, tmp_path):
    same = {"model.pretrained_model_name_or_path": without_dropout(pairs_run, tmp_path), "train.eval_every": 0}
    same |= {"train.max_steps": 3}
    runs = []
    for parts in (1, 2, 4):
        split = {"train.gradient_accumulation_steps": parts, "train.output_dir": tmp_path / str(parts)}
        runs.append(losses_of(train_preference([*pairs_run, *options(same | split)])))
    for other in runs[1:]:
        for step, expected in zip(other, runs[0], strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, LORA, {"train.shard": "full"}, LORA | {"train.shard": "full"}])
def test_two_processes_train_the_same(pairs_run, tmp_path, fields):
    argv = [
        *pairs_run,
        *options({"model.pretrained_model_name_or_path": without_dropout(pairs_run, tmp_path)} | fields),
    ]
    launch_two(argv, script=PREFERENCE_SCRIPT).check_returncode()
    alone = train_preference([*argv, "--train.output_dir", str(tmp_path / "alone")])
    for step, expected in zip(losses_of(tmp_path / "run"), losses_of(alone), strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=ROUNDING)
    last, other = (metrics_without_times(run)[-1] for run in (tmp_path / "run", alone))
    assert last["validation_margin"] == pytest.approx(other["validation_margin"], rel=1e-4, abs=ROUNDING)
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(tmp_path / "run/checkpoint-4")]
    launch_two([*argv, *resumed], script=PREFERENCE_SCRIPT).check_returncode()
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preference.beta": 0}, "preference.beta: must be above 0, got 0"),
        ({"loss.type": "huber", "loss.huber_schedule": "constant"}, "loss.type: must be mse for pairs: "),
        ({"strategy.dream_training": True}, "strategy.dream_training: not for pairs: "),
        ({"noise.pairing": "nearest"}, "noise.pairing: not for pairs: "),
        ({"loss.learned_uncertainty": True}, "loss.learned_uncertainty: not for pairs: "),
        ({"model.train_text_encoder": True}, "model.train_text_encoder: not for pairs: "),
        (LORA | {"model.trainable": ["*"]}, "model.trainable: not for pairs with model.lora"),
        ({"evaluation.fid_features": "inception"}, "evaluation.fid_features: not for pairs"),
        ({"train.keep_best": "shapes_preferred"}, "train.keep_best: needs evaluation.shapes_judge and evaluation.pr"),
        ({"train.keep_best": "validation_implicit_accuracy"}, "train.keep_best: needs data.validation_split or"),
        ({"data.mask_column": "mask"}, "data.mask_column: is of single images"),
        ({"data.rejected_column": "chosen"}, "data.rejected_column: must be another column than image_column, "),
        ({"data.rejected_column": ""}, "data.rejected_column: must not be empty"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused_as_the_config_loads(fields, message):
    required = {"model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion", "data.dataset": "pairs"}
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse_config(PreferenceConfig, options(required | fields))
