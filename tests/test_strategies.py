"""Every objective and strategy in a run: it trains, resumes to the same bytes, and does not mind how a batch is split.
A covering set: each option stands in at least one row, beside others that it has to get along with."""

from pathlib import Path

import pytest
from helpers import (
    CACHES,
    assert_refused,
    launch,
    metrics_without_times,
    options,
    parse_config,
    pipeline_bytes,
    short_options,
    train,
    without_dropout,
)

from difftrain_utils.errors import InputError

COVERING = {
    "dream": {"strategy.dream_training": True, "strategy.dream_start_step": 2, "model.prediction_type": "epsilon"},
    "dream-half-v-perturbed": {
        "strategy.dream_training": True,
        "strategy.dream_probability": 0.5,
        "strategy.dream_detail_preservation": 10.0,
        "noise.input_perturbation": 0.1,
        "loss.weighting": "min_snr",
        **CACHES,
    },
    "dream-flow-logit-normal": {
        "strategy.dream_training": True,
        "model.prediction_type": "flow_prediction",
        "timesteps.density": "logit_normal",
        "scheduler.flow_shift": 2.0,
        "scheduler.flow_base_resolution": 16,
        "loss.weighting": "sigma_sqrt",
    },
    "dream-sample-offset": {
        "strategy.dream_training": True,
        "model.prediction_type": "sample",
        "scheduler.path": "linear",
        "noise.offset": 0.1,
        "loss.weighting": "debiased",
    },
    "zero-snr-stratified-p2": {
        "scheduler.rescale_betas_zero_snr": True,
        "timesteps.stratified": True,
        "loss.weighting": "p2",
        "loss.type": "huber",
        "loss.huber_schedule": "snr",
    },
    "pyramid-soft-min-snr": {
        "noise.pyramid_discount": 0.8,
        "loss.weighting": "soft_min_snr",
        "loss.type": "l1",
        "timesteps.density": "mode",
    },
    "nearest-groups": {
        "noise.pairing": "nearest",
        "train.group_size": 2,
        "data.cache_text": True,
        "timesteps.density": "log_normal",
        "timesteps.p_mean": -0.5,
        "loss.weighting": "edm",
        "loss.edm_sigma_data": 1.0,
    },
    "table-smooth-l1": {
        "timesteps.density": "table",
        "timesteps.table": [1.0, 2.0, 1.0],
        "loss.type": "smooth_l1",
        "loss.huber_schedule": "exponential",
        "loss.weighting": "snr",
    },
    "flow-cosmap-range": {
        "model.prediction_type": "flow_prediction",
        "timesteps.density": "cosmap",
        "timesteps.min": 0.1,
        "timesteps.max": 0.9,
        "timesteps.stratified": True,
        "loss.weighting": "cosmap",
        "train.channels_last": True,
        "ema.update_every": 2,
    },
    "learned-uncertainty": {
        "scheduler.path": "cosine",
        "loss.learned_uncertainty": True,
        "loss.weighting": "edm",
        "loss.edm_sigma_data": 1.0,
        "timesteps.density": "log_normal",
        "timesteps.p_mean": -0.5,
    },
    "muon": {
        "optimizer.class_path": "torch.optim.Muon",
        "optimizer.init_args.adjust_lr_fn": "match_rms_adamw",
        "optimizer.groups": {"*.bias": {"weight_decay": 0.0}},
    },
    "adamw-8bit": {"optimizer.class_path": "bitsandbytes.optim.AdamW8bit", "optimizer.init_args.min_8bit_size": 1},
    "adafactor": {"optimizer.class_path": "torch.optim.Adafactor"},
    "ademamix-8bit": {
        "optimizer.class_path": "bitsandbytes.optim.AdEMAMix8bit",
        "optimizer.init_args.min_8bit_size": 1,
    },
    "schedule-free": {
        "optimizer.class_path": "schedulefree.AdamWScheduleFree",
        "ema.enabled": False,
        "data.validation_split": 0.2,
        "train.eval_every": 3,
    },
    "contrastive-transport": {
        "loss.contrastive": 0.05,
        "noise.pairing": "transport",
        "data.caption_dropout": 0.5,
        "train.group_size": 2,
        "loss.weighting": "min_snr",
        **CACHES,
    },
    "knn": {
        "noise.pairing": "knn",
        "noise.knn_candidates": 3,
        "noise.offset": 0.1,
        "loss.contrastive": 0.05,
        "train.group_size": 2,
    },
    "other-schedule": {
        "scheduler.sampler": "DPMSolverMultistepScheduler",
        "scheduler.beta_schedule": "scaled_linear",
        "scheduler.num_train_timesteps": 500,
    },
}


@pytest.fixture(scope="module")
def default_run(checkpoint_folder, image_folder, tmp_path_factory) -> Path:
    return train(short_options(checkpoint_folder, image_folder, tmp_path_factory.mktemp("runs") / "default"))


QUICK = ("dream-flow-logit-normal", "learned-uncertainty")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in COVERING])
def test_it_trains_resumes_and_splits_exactly(short_run, default_run, tmp_path, name):
    common = [*short_run, *options(COVERING[name])]
    unbroken = train([*common, "--output-dir", str(tmp_path / "unbroken"), "--train.keep_checkpoints", "0"])
    resume = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    resumed = train([*common, *resume])
    assert pipeline_bytes(resumed) == pipeline_bytes(unbroken)
    assert metrics_without_times(resumed) == metrics_without_times(unbroken)[2:]
    if name != "other-schedule":
        assert pipeline_bytes(default_run) != pipeline_bytes(unbroken)  # the options do something

    model = ["--model.pretrained_model_name_or_path", str(without_dropout(short_run, tmp_path))]
    losses = []
    for accumulation in (1, 2):
        split = ["--train.gradient_accumulation_steps", str(accumulation)]
        run = train([*common, *model, *split, "--output-dir", str(tmp_path / f"split-{accumulation}")])
        losses.append([entry["loss"] for entry in metrics_without_times(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps.density": "table"}, "timesteps.table: goes with timesteps.density table"),
        ({"timesteps.table": [1.0]}, "timesteps.table: goes with timesteps.density table"),
        ({"timesteps.density": "table", "timesteps.table": [0.0]}, "timesteps.table: must be weights of 0 or more"),
        ({"timesteps.min": 0.5, "timesteps.max": 0.5}, "timesteps.min: must be from 0 to below max"),
        ({"loss.huber_schedule": "snr"}, "loss.huber_schedule: does nothing for loss.type mse"),
        (
            {"train.group_size": 2},
            "train.group_size: goes with noise.pairing nearest and transport, and with loss.contr",
        ),
        ({"train.group_size": 2, "noise.pairing": "knn"}, "train.group_size: goes with noise.pairing nearest and"),
        ({"noise.knn_candidates": 8}, "noise.knn_candidates: goes with noise.pairing knn, got 8"),
        ({"loss.contrastive": 1.0}, "loss.contrastive: must be at least 0 and below 1, from where on no"),
        ({"loss.contrastive": 0.1, "train.group_size": 1}, "loss.contrastive: needs others: train.group_size"),
        ({"noise.pairing": "nearest", "train.group_size": 1}, "noise.pairing: needs others: train.group_size"),
        ({"loss.contrastive": 0.1, "data.caption_dropout": 1.0}, "loss.contrastive: needs captions"),
        ({"loss.contrastive": 0.1, "loss.learned_uncertainty": True}, "loss.contrastive: cannot go with loss.learned"),
        ({"scheduler.flow_base_resolution": 512}, "scheduler.flow_base_resolution: needs scheduler.flow_shift"),
        (
            {"scheduler.flow_shift_by_tokens": [[64, 2.0], [16, 1.0]]},
            "scheduler.flow_shift_by_tokens: must be two rising",
        ),
        ({"noise.pyramid_discount": 1.0}, "noise.pyramid_discount: must be at least 0 and below 1, got 1.0"),
        ({"strategy.dream_detail_preservation": -1.0}, "strategy.dream_detail_preservation: must be 0 or more"),
        ({"strategy.dream_probability": 2.0}, "strategy.dream_probability: must be between 0 and 1, got 2.0"),
    ],
)
def test_what_does_not_go_together_is_refused_as_the_config_loads(short_run, fields, message):
    with pytest.raises(InputError, match=message):
        parse_config([*short_run, *options(fields)])


def test_pairs_need_their_group_in_one_part_of_the_batch(short_run, tmp_path):
    split = ["--noise.pairing", "nearest", "--train.gradient_accumulation_steps", "2"]
    assert_refused(launch([*short_run, *split]), r"train.group_size: must divide a part of the batch, which is 2")
    assert not (tmp_path / "run").exists()
