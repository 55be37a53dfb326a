import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.objective import SchedulerConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.samplers import build_schedulers

SD15 = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)


def build(prediction_type=None, checkpoint=SD15, resolution=512, **fields):
    config = TextToImageConfig(
        ModelConfig("m", prediction_type=prediction_type), DataConfig("d", resolution=resolution), SchedulerConfig()
    )
    config.scheduler = SchedulerConfig(**fields)
    return build_schedulers(type(checkpoint), checkpoint.config, config)


def test_the_checkpoints_schedule_is_kept():
    noise_scheduler, sampler = build()
    assert isinstance(noise_scheduler, DDPMScheduler) and isinstance(sampler, PNDMScheduler)
    assert torch.equal(noise_scheduler.alphas_cumprod, SD15.alphas_cumprod)
    assert noise_scheduler.config.prediction_type == sampler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_reaches_the_training_schedule_and_the_sampler(name):
    noise_scheduler, sampler = build("v_prediction", rescale_betas_zero_snr=True, sampler=name)
    assert noise_scheduler.alphas_cumprod[-1] == 0
    # Lin et al. 2024, arXiv:2305.08891, algorithm 1: sqrt(ᾱ) shifted to end in 0 and scaled to begin as before
    root = SD15.alphas_cumprod.double().sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(noise_scheduler.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sampler.alphas_cumprod, noise_scheduler.alphas_cumprod, rtol=0, atol=1e-6)


def test_the_config_overrides_the_schedule():
    noise_scheduler, sampler = build(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, sampler="DDIMScheduler"
    )
    assert len(noise_scheduler.alphas_cumprod) == 100 and isinstance(sampler, DDIMScheduler)
    expected = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.equal(noise_scheduler.alphas_cumprod, expected)


def test_flow_has_a_sampler_that_integrates_it():
    noise_scheduler, sampler = build("flow_prediction", flow_shift=2.0, flow_base_resolution=256)
    assert isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler) and noise_scheduler.config.shift == 4
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
        noise_scheduler, again = build(checkpoint=checkpoint)
        assert isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler) and noise_scheduler.config.shift == 3
        assert again.config.flow_shift == 3 and again.config.prediction_type == "flow_prediction"
    noise_scheduler, _ = build(checkpoint=sampler, flow_shift=1.0)
    assert noise_scheduler.config.shift == 1


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
    ],
)
def test_what_does_not_fit_is_refused(prediction_type, fields, message):
    with pytest.raises(InputError, match=message):
        build(prediction_type, **fields)


def test_euler_fits_as_it_is():
    _, sampler = build("v_prediction", sampler="EulerDiscreteScheduler")
    assert isinstance(sampler, EulerDiscreteScheduler) and sampler.config.prediction_type == "v_prediction"
