import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from difftrain_utils.objective.schedule import (
    PREDICTION_TYPES,
    add_noise,
    alphas_and_sigmas,
    append_dims,
    compute_snr,
    get_predicted_noise,
    get_target,
)

SHAPES = [(6, 4, 17), (6, 4, 8, 8), (6, 4, 3, 8, 8)]  # audio, images, video


def scheduler(prediction_type: str, beta_schedule: str = "scaled_linear", **fields):
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule, **fields)


def in_float64(prediction_type: str):
    noise_scheduler = scheduler(prediction_type)
    if prediction_type != "flow_prediction":
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.double()
    return noise_scheduler


def random_input(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    latents, noise = torch.randn(2, *shape, generator=generator, dtype=dtype)
    timesteps = torch.cat([torch.tensor([0, 999]), torch.randint(1000, (shape[0] - 2,), generator=generator)])
    return latents, noise, timesteps


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_diffusers(shape, beta_schedule):
    latents, noise, timesteps = random_input(shape)
    noise_scheduler = scheduler("v_prediction", beta_schedule)
    expected = noise_scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(add_noise(noise_scheduler, latents, noise, timesteps), expected)
    expected = noise_scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(get_target(noise_scheduler, latents, noise, timesteps), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_target_gives_back_the_clean_latents_and_the_noise_in_float64(shape, prediction_type):
    latents, noise, timesteps = random_input(shape, torch.float64)
    if prediction_type == "flow_prediction":
        timesteps = timesteps.double() * 0.999 + 0.5
    noise_scheduler = in_float64(prediction_type)
    a, s = (append_dims(x, latents) for x in alphas_and_sigmas(noise_scheduler, timesteps))
    total = a + s if prediction_type == "flow_prediction" else a**2 + s**2
    torch.testing.assert_close(total, torch.ones_like(a), rtol=0, atol=1e-15)
    noisy = add_noise(noise_scheduler, latents, noise, timesteps)
    target = get_target(noise_scheduler, latents, noise, timesteps)
    recovered = {
        "epsilon": (noisy - s * target) / a,
        "v_prediction": a * noisy - s * target,
        "sample": target,
        "flow_prediction": noisy - s * target,
    }
    torch.testing.assert_close(recovered[prediction_type], latents, rtol=1e-10, atol=1e-10)
    predicted = get_predicted_noise(noise_scheduler, noisy, target, timesteps)
    torch.testing.assert_close(predicted, noise, rtol=1e-9, atol=1e-9)


def test_flow_agrees_with_diffusers():
    latents, noise, _ = random_input((6, 4, 8, 8))
    noise_scheduler = scheduler("flow_prediction")
    timesteps = noise_scheduler.timesteps[torch.tensor([0, 1, 300, 500, 900, 999])]
    expected = noise_scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(add_noise(noise_scheduler, latents, noise, timesteps), expected)
    # the straight line's slope
    step = add_noise(noise_scheduler, latents, noise, timesteps) + 0.1 * get_target(
        noise_scheduler, latents, noise, timesteps
    )
    torch.testing.assert_close(add_noise(noise_scheduler, latents, noise, timesteps + 100), step)


def test_the_snr_is_finite_and_positive_at_both_ends():
    betas_to_zero = scheduler("v_prediction", rescale_betas_zero_snr=True)
    assert betas_to_zero.alphas_cumprod[-1] == 0
    for noise_scheduler, ends in (
        (betas_to_zero, torch.tensor([0, 999])),
        (scheduler("flow_prediction"), torch.tensor([0.0, 1000.0])),
    ):
        snr = compute_snr(noise_scheduler, ends)
        assert snr.isfinite().all() and (snr > 0).all() and snr[0] > 100 and snr[1] < 1e-6
    noise_scheduler, timesteps = scheduler("epsilon"), torch.arange(1000)
    from diffusers.training_utils import compute_snr as reference

    torch.testing.assert_close(compute_snr(noise_scheduler, timesteps), reference(noise_scheduler, timesteps))


def test_v_is_the_derivative_of_the_noisy_latents_by_the_angle():
    # x(φ) = cos φ · x_0 + sin φ · ε, v = dx/dφ (Salimans & Ho 2022, appendix D), by autograd
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64)
    noise_scheduler = in_float64("v_prediction")
    a, s = alphas_and_sigmas(noise_scheduler, timesteps)
    angle = append_dims(torch.atan2(s, a), latents)
    _, derivative = torch.func.jvp(lambda φ: φ.cos() * latents + φ.sin() * noise, (angle,), (torch.ones_like(angle),))
    torch.testing.assert_close(get_target(noise_scheduler, latents, noise, timesteps), derivative)


def test_an_unknown_prediction_type_is_refused():
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample, flow_prediction, got 'score'"):
        get_target(noise_scheduler, *random_input((2, 4, 8, 8)))
