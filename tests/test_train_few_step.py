"""train_few_step.py keeps the promises of the image script, and plain pipelines sample what it exports."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import (
    FEW_STEP_SCRIPT,
    launch_two,
    metrics_without_times,
    options,
    pipeline_bytes,
    train_few_step,
)
from PIL import Image

from difftrain_utils.commands import generate
from difftrain_utils.errors import InputError

MEAN_FLOW = {"few_step.method": "mean_flow", "few_step.flow_share": 0.5}
SHORTCUT = {"few_step.method": "shortcut", "few_step.flow_share": 0.5, "few_step.num_steps": 8}
CONSISTENCY = {"few_step.method": "consistency", "scheduler.path": "cosine", "model.prediction_type": "v_prediction"}
CONSISTENCY |= {"loss.learned_uncertainty": True, "few_step.warmup_steps": 4, "timesteps.density": "log_normal"}
CONSISTENCY |= {"timesteps.p_mean": -1.0}
VARIANTS = {
    "mean_flow": MEAN_FLOW | {"few_step.guidance": 1.5, "few_step.guidance_mix": 0.25, "data.cache_text": True},
    "shortcut-sdxl": SHORTCUT | {"few_step.guidance": 2.0, "model.pretrained_model_name_or_path": "builtin:tiny-sdxl"},
    "consistency": CONSISTENCY,
    "mean_flow-flux": MEAN_FLOW
    | {
        "model.pretrained_model_name_or_path": "builtin:tiny-flux",
        "model.max_sequence_length": 24,
        "scheduler.flow_shift": 1.0,
        "train.gradient_checkpointing": True,
    },
    "consistency-dit": CONSISTENCY | {"model.pretrained_model_name_or_path": "builtin:tiny-dit"},
}
QUICK = ("mean_flow",)


@pytest.fixture
def few_step_run(tmp_path) -> list[str]:
    """Options of a run of seconds."""
    return options(
        {
            "model.pretrained_model_name_or_path": "builtin:tiny-stable-diffusion",
            "model.prediction_type": "flow_prediction",
            "data.dataset": "builtin:shapes",
            "data.resolution": 32,
            "data.caption_dropout": 0.3,
            "data.validation_split": 0.05,
            "train.output_dir": tmp_path / "run",
            "train.max_steps": 4,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.eval_every": 4,
            "train.save_every": 2,
            "train.keep_checkpoints": 0,
            "train.cpu_threads": 1,
            "optimizer.init_args.lr": 1e-3,
            "evaluation.prompts": ["a red circle", "a blue square"],
            "evaluation.num_validation_samples": 8,
            "evaluation.shapes_judge": True,
        }
    )


def losses(argv: list[str], tmp_path, parts: int) -> list[float]:
    split = {"train.gradient_accumulation_steps": parts, "train.output_dir": tmp_path / str(parts)}
    split |= {"train.eval_every": 0, "train.save_every": 0}
    return [entry["loss"] for entry in metrics_without_times(train_few_step([*argv, *options(split)]))]


def assert_plain_pipelines_draw_the_same(run, name: str, tmp_path) -> None:
    """Told the length of a step as its guidance_scale, they draw what `difftrain generate` draws."""
    steps, told = {"mean_flow": (2, 1.5), "shortcut-sdxl": (1, 2.0), "consistency": (2, 1.0)}.get(name, (1, 1.0))
    size = {} if name == "consistency-dit" else {"height": 32, "width": 32}
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    prompt = pipeline.get_label_ids(["a red circle"]) if name == "consistency-dit" else "a red circle"
    generator = [torch.Generator().manual_seed(0)]
    draw = partial(pipeline, prompt, num_inference_steps=steps, generator=generator, **size)
    image = draw(guidance_scale=told).images[0]
    drawn = tmp_path / "drawn.png"
    generate.main([str(run), "a red circle", "--steps", str(steps), "--output", str(drawn)])
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(image))
    if "consistency" not in name:
        with pytest.raises(InputError, match=r"--guidance: .* is told by it how far a step goes, which --steps says"):
            generate.main([str(run), "a red circle", "--guidance", "2"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in VARIANTS])
def test_it_trains_resumes_and_splits_exactly(few_step_run, tmp_path, name):
    argv = [*few_step_run, *options(VARIANTS[name])]
    unbroken = train_few_step(argv)
    metrics = metrics_without_times(unbroken)
    assert {"validation_loss", "validation_loss_ema", "shapes_right"} <= metrics[-1].keys()
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    train_few_step([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics[2:]
    if name != "mean_flow-flux":  # of what texts are cut to, a pipeline's folder says nothing
        assert_plain_pipelines_draw_the_same(unbroken, name, tmp_path)
    whole = [entry["loss"] for entry in metrics]
    if name in QUICK:
        unguided = losses([*argv, "--few_step.guidance", "1", "--few_step.guidance_mix", "0"], tmp_path, 1)
        assert not np.isclose(unguided, whole, rtol=1e-3).any()
    for parts in (2,) if name in QUICK else (2, 4):
        assert losses(argv, tmp_path, parts) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "shortcut-sdxl", "consistency"])
def test_two_processes_train_the_same(few_step_run, tmp_path, name):
    """The passes of the target's own are of the bare denoiser, that of the gradient of the one that DDP wraps."""
    argv = [*few_step_run, *options(VARIANTS[name] | {"train.eval_every": 0, "train.max_steps": 3})]
    launch_two(argv, script=FEW_STEP_SCRIPT).check_returncode()
    alone = train_few_step([*argv, "--train.output_dir", str(tmp_path / "alone")])
    for entry, other in zip(metrics_without_times(tmp_path / "run"), metrics_without_times(alone), strict=True):
        for metric in ("loss", "grad_norm"):
            assert entry[metric] == pytest.approx(other[metric], rel=1e-4)


def test_what_does_not_fit(few_step_run):
    for fields, message in (
        (SHORTCUT | {"few_step.num_steps": 3}, "few_step.num_steps: must be a power of 2"),
        (CONSISTENCY | {"few_step.flow_share": 0.5}, "few_step.flow_share: goes with few_step.method mean_flow or sh"),
        (MEAN_FLOW | {"train.plain_attention": True}, "train.plain_attention: not with few_step.method mean_flow"),
        ({"evaluation.guidance_rescale": 0.7}, "evaluation.guidance_rescale: not here: there is no guidance"),
        ({"evaluation.guidance_interval": [0.2, 0.8]}, "evaluation.guidance_interval: not here"),
        ({"scheduler.sampler": "DDIMScheduler"}, "scheduler.sampler: DDIMScheduler does not sample the path linear"),
        (CONSISTENCY | {"few_step.guidance": 2.0}, "few_step.guidance: goes with few_step.method mean_flow or"),
        (
            SHORTCUT | {"few_step.guidance": 2.0, "few_step.guidance_mix": 0.5},
            "few_step.guidance_mix: goes with few_step.method mean_flow",
        ),
        (
            {"loss.weighting": "cosmap"},
            "loss.weighting: with few_step.method mean_flow needs few_step.adaptive_power 0",
        ),
        ({"loss.type": "l1"}, "loss.type: with few_step.method mean_flow needs few_step.adaptive_power 0"),
        (SHORTCUT | {"timesteps.min": 0.3}, "timesteps.min: not with few_step.method shortcut"),
        (
            SHORTCUT | {"evaluation.num_inference_steps": 3},
            "evaluation.num_inference_steps: must be a power of 2 up to 4",
        ),
        ({"evaluation.guidance_scale": 2.0}, "evaluation.guidance_scale: must be 1; few_step.guidance"),
        ({"strategy.dream_training": True}, "strategy.dream_training: is of train_text_to_image.py"),
        ({"model.lora.rank": 4}, "model.lora: needs model.trainable"),
        ({"model.prediction_type": "epsilon"}, "model.prediction_type: must be flow_prediction for few_step.method"),
        ({"train.shard": "full"}, "train.shard: not here: the derivative"),
        ({"scheduler.flow_shift": 2.0}, "scheduler.flow_shift: must be 1 for mean_flow, whose steps are equal"),
        (
            {"model.prediction_type": None},
            "few_step.method: mean_flow is of flow_prediction on the path linear, got v_prediction on the path ddpm",
        ),
        (
            {"model.pretrained_model_name_or_path": "builtin:tiny-sd3", "scheduler.flow_shift": 1.0},
            "few_step.method: a StableDiffusion3Pipeline cannot tell its denoiser how far a step goes",
        ),
        (
            VARIANTS["consistency-dit"] | {"evaluation.num_inference_steps": 2},
            "evaluation.num_inference_steps: must be 1 for consistency, a DiTPipeline gives its sampler no generator",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            train_few_step([*few_step_run, *options(fields)])
