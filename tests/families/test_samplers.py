import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PNDMScheduler,
)

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.objective import SchedulerConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.samplers import build_schedule

FLOW = [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler]
SD15 = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)


def build(prediction_type=None, checkpoint=SD15, resolution=512, has_init_noise_sigma=True, evaluation=None, **fields):
    """As for Stable Diffusion, whose pipeline asks for `init_noise_sigma`, unless it is said otherwise."""
    config = TextToImageConfig(
        ModelConfig("m", prediction_type=prediction_type), DataConfig("d", resolution=resolution)
    )
    config.scheduler, config.evaluation = SchedulerConfig(**fields), evaluation or EvaluationConfig()
    return build_schedule(type(checkpoint), checkpoint.config, config, has_init_noise_sigma)


@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_a_shift_without_flow_is_refused(prediction_type):
    name = prediction_type or "epsilon"
    with pytest.raises(InputError, match=rf"^scheduler.flow_shift: goes with flow_prediction, not with {name}, got 3"):
        build(prediction_type, flow_shift=3.0)


def test_flow_sigmas_of_another_prediction_are_refused():
    """They would be trained with the betas that the sampler's config has all the same."""
    flow = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
    with pytest.raises(InputError, match=r"^model.prediction_type: .* flow sigmas, and no betas for sample$"):
        build(checkpoint=flow)


def test_more_inference_steps_than_there_are_timesteps_are_refused():
    """Before training, not at the first evaluation; where nothing is generated they do not matter."""
    assert build(num_train_timesteps=10)
    evaluation = EvaluationConfig(prompts=["a"])
    message = r"^evaluation.num_inference_steps: PNDMScheduler refuses 25: there are 10 timesteps$"
    with pytest.raises(InputError, match=message):
        build(num_train_timesteps=10, evaluation=evaluation)
    assert build(num_train_timesteps=25, evaluation=evaluation)


def test_the_checkpoints_schedule_is_kept():
    schedule, sampler = build()
    assert schedule.path == "ddpm" and isinstance(sampler, PNDMScheduler)
    assert torch.equal(schedule.alphas_cumprod, SD15.alphas_cumprod)
    assert schedule.prediction_type == sampler.config.prediction_type == "epsilon"
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_reaches_the_training_schedule_and_the_sampler(name):
    schedule, sampler = build("v_prediction", rescale_betas_zero_snr=True, sampler=name)
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999  # where there is no signal, and pictures begin
    assert schedule.alphas_cumprod[-1] == 0
    # Lin et al. 2024, arXiv:2305.08891, algorithm 1: sqrt(ᾱ) shifted to end in 0 and scaled to begin as before
    root = SD15.alphas_cumprod.double().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sampler.alphas_cumprod, schedule.alphas_cumprod, rtol=0, atol=1e-6)


def test_the_config_overrides_the_schedule():
    schedule, sampler = build(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, sampler="DDIMScheduler")
    assert len(schedule.alphas_cumprod) == schedule.num_train_timesteps == 100 and isinstance(sampler, DDIMScheduler)
    expected = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.equal(schedule.alphas_cumprod, expected)


def test_flow_has_a_sampler_that_integrates_it():
    schedule, sampler = build("flow_prediction", flow_shift=2.0, flow_base_resolution=256)
    assert schedule.path == "linear" and schedule.prediction_type == "flow_prediction" and schedule.shift == 4
    assert isinstance(sampler, DPMSolverMultistepScheduler)
    # with the true velocity of a single image, x_1 = ε goes to the image
    image, noise = torch.full((1, 4, 8, 8), 0.7), torch.randn(1, 4, 8, 8)
    sampler.set_timesteps(20)
    latents = noise * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        sigma = sampler.sigmas[sampler.step_index or 0]
        velocity = (latents - image) / sigma
        latents = sampler.step(velocity, timestep, latents).prev_sample
    torch.testing.assert_close(latents, image, rtol=0, atol=1e-3)


def test_a_saved_flow_pipelines_scheduler_is_understood_again():
    _, sampler = build("flow_prediction", flow_shift=3.0)
    for checkpoint in (sampler, FlowMatchEulerDiscreteScheduler(shift=3.0)):  # the latter does not name its type
        schedule, again = build(checkpoint=checkpoint)
        assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction") and schedule.shift == 3
        assert again.config.flow_shift == 3 and again.config.prediction_type == "flow_prediction"
    schedule, _ = build(checkpoint=sampler, flow_shift=1.0)
    assert schedule.shift == 1


@pytest.mark.parametrize(
    "checkpoint",
    [*(cls(shift=3.0) for cls in FLOW), FlowMatchEulerDiscreteScheduler(3000, 3.0, use_dynamic_shifting=True)],
)
def test_a_flow_matching_sampler_is_kept_as_it_is_unless_the_pipeline_cannot_use_it(checkpoint):
    steps = checkpoint.config.num_train_timesteps
    for prediction_type in (None, "flow_prediction"):
        for has_init_noise_sigma in (False, True):
            schedule, sampler = build(prediction_type, checkpoint, has_init_noise_sigma=has_init_noise_sigma)
            assert (schedule.path, schedule.prediction_type) == ("linear", "flow_prediction")
            assert (schedule.num_train_timesteps, schedule.shift) == (steps, 3.0)
            if has_init_noise_sigma:
                assert type(sampler) is DPMSolverMultistepScheduler and sampler.config.flow_shift == 3.0
                assert sampler.config.use_flow_sigmas and sampler.config.prediction_type == "flow_prediction"
                assert sampler.config.num_train_timesteps == steps
            else:
                assert sampler.to_json_string() == checkpoint.to_json_string()


def test_the_config_overrides_the_shift_of_a_sampler_that_is_kept():
    checkpoint = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3)
    schedule, sampler = build(None, checkpoint, 512, False, flow_shift=2.0, flow_base_resolution=1024)
    own, kept = (json.loads(scheduler.to_json_string()) for scheduler in (checkpoint, sampler))
    assert schedule.shift == 1 and kept == own | {"shift": 1.0, "use_dynamic_shifting": False}


@pytest.mark.parametrize(
    ("prediction_type", "fields", "message"),
    [
        (None, {"rescale_betas_zero_snr": True}, "epsilon says nothing of the image at pure noise"),
        ("v_prediction", {"rescale_betas_zero_snr": True}, "PNDMScheduler does not know this noise schedule"),
        ("sample", {}, "scheduler.sampler: PNDMScheduler cannot sample sample"),
        (None, {"sampler": "FastScheduler"}, "scheduler.sampler: diffusers has no scheduler 'FastScheduler'"),
        (None, {"sampler": "AutoencoderKL"}, "scheduler.sampler: diffusers has no scheduler 'AutoencoderKL'"),
        ("flow_prediction", {"beta_schedule": "linear"}, "flow_prediction has no betas"),
        ("flow_prediction", {"sampler": "DDIMScheduler"}, "scheduler.sampler: DDIMScheduler"),
        (
            "flow_prediction",
            {"sampler": FLOW[0].__name__},
            f"scheduler.sampler: {FLOW[0].__name__} cannot .*init_noise",
        ),
        (
            "flow_prediction",
            {"sampler": FLOW[1].__name__},
            f"scheduler.sampler: {FLOW[1].__name__} cannot .*init_noise",
        ),
        (
            "flow_prediction",
            {"sampler": FLOW[2].__name__},
            f"scheduler.sampler: {FLOW[2].__name__} cannot .*init_noise",
        ),
    ],
)
def test_what_does_not_fit_is_refused(prediction_type, fields, message):
    with pytest.raises(InputError, match=message):
        build(prediction_type, **fields)


def test_euler_fits_as_it_is():
    _, sampler = build("v_prediction", sampler="EulerDiscreteScheduler")
    assert isinstance(sampler, EulerDiscreteScheduler) and sampler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "checkpoint",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.3),
        DPMSolverMultistepScheduler(
            solver_order=3, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    ],
    ids=lambda checkpoint: type(checkpoint).__name__,
)
def test_the_checkpoints_own_sampler_named_once_more_is_still_its_own(checkpoint):
    _, sampler = build(checkpoint=checkpoint, has_init_noise_sigma=False, sampler=type(checkpoint).__name__)
    assert type(sampler) is type(checkpoint)
    own, kept = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (checkpoint, sampler))
    assert kept == own
