import pytest
import torch
from diffusers import DDPMScheduler

from difftrain_utils.objectives import add_noise, alphas_and_sigmas, append_dims, get_target

SHAPES = [(6, 4, 17), (6, 4, 8, 8), (6, 4, 3, 8, 8)]  # audio, images, video


def scheduler(prediction_type: str, beta_schedule: str = "scaled_linear") -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule=beta_schedule)


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
def test_each_target_gives_back_the_clean_latents_in_float64(shape):
    latents, noise, timesteps = random_input(shape, torch.float64)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        noise_scheduler = scheduler(prediction_type)
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.double()
        a, s = (append_dims(x, latents) for x in alphas_and_sigmas(noise_scheduler, timesteps))
        torch.testing.assert_close(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-15)
        noisy = add_noise(noise_scheduler, latents, noise, timesteps)
        target = get_target(noise_scheduler, latents, noise, timesteps)
        recovered = {
            "epsilon": (noisy - s * target) / a,
            "v_prediction": a * noisy - s * target,
            "sample": target,
        }
        torch.testing.assert_close(recovered[prediction_type], latents, rtol=1e-11, atol=1e-11)


def test_v_is_the_derivative_of_the_noisy_latents_by_the_angle():
    # x(φ) = cos φ · x_0 + sin φ · ε, v = dx/dφ (Salimans & Ho 2022, appendix D), by autograd
    latents, noise, timesteps = random_input((6, 4, 8, 8), torch.float64)
    noise_scheduler = scheduler("v_prediction")
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.double()
    a, s = alphas_and_sigmas(noise_scheduler, timesteps)
    angle = append_dims(torch.atan2(s, a), latents)
    _, derivative = torch.func.jvp(lambda φ: φ.cos() * latents + φ.sin() * noise, (angle,), (torch.ones_like(angle),))
    torch.testing.assert_close(get_target(noise_scheduler, latents, noise, timesteps), derivative)


def test_an_unknown_prediction_type_is_refused():
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="epsilon, v_prediction or sample, got 'score'"):
        get_target(noise_scheduler, *random_input((2, 4, 8, 8)))
