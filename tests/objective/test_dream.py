import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents

from difftrain_utils.objective.dream import dream_noise
from difftrain_utils.objective.schedule import (
    PREDICTION_TYPES,
    add_noise,
    alphas_and_sigmas,
    append_dims,
    get_predicted_noise,
    get_target,
)


def scheduler(prediction_type: str):
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")


def random_input(shape, prediction_type):
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, *shape, generator=generator)
    timesteps = torch.randint(1, 1000, shape[:1], generator=generator)
    return latents, noise, predicted, timesteps.float() if prediction_type == "flow_prediction" else timesteps


@pytest.mark.parametrize("p", [0.0, 1.0, 10.0])
def test_equals_diffusers_for_epsilon(p):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    noise_scheduler, states = scheduler("epsilon"), torch.randn(5, 3, 8)
    latents, noise, _, timesteps = random_input((5, 4, 8, 8), "epsilon")
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    expected = compute_dream_and_update_latents(
        unet, noise_scheduler, timesteps, noise, noisy.clone(), noise.clone(), states, p
    )
    predict = lambda noisy_latents, t: unet(noisy_latents, t, states).sample  # noqa: E731
    rectified = dream_noise(predict, noise_scheduler, latents, noise, timesteps, p)
    assert not rectified.requires_grad
    torch.testing.assert_close(add_noise(noise_scheduler, latents, rectified, timesteps), expected[0])
    torch.testing.assert_close(get_target(noise_scheduler, latents, rectified, timesteps), expected[1])


@pytest.mark.parametrize("shape", [(4, 3, 9), (4, 3, 8, 8), (4, 3, 2, 6, 6)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_new_targets_are_those_of_the_derivation(prediction_type, shape):
    noise_scheduler = scheduler(prediction_type)
    latents, noise, model_pred, timesteps = random_input(shape, prediction_type)
    a, s = (append_dims(x, latents) for x in alphas_and_sigmas(noise_scheduler, timesteps))
    noisy = add_noise(noise_scheduler, latents, noise, timesteps)
    rectified = dream_noise(lambda *_: model_pred, noise_scheduler, latents, noise, timesteps, 2.0)
    predicted_noise = get_predicted_noise(noise_scheduler, noisy, model_pred, timesteps)
    delta = (s / (a**2 + s**2).sqrt()) ** 2 * (noise - predicted_noise)
    torch.testing.assert_close(add_noise(noise_scheduler, latents, rectified, timesteps), noisy + s * delta)
    change = {"epsilon": delta, "v_prediction": a * delta, "sample": 0 * delta, "flow_prediction": delta}
    target = get_target(noise_scheduler, latents, noise, timesteps)
    torch.testing.assert_close(
        get_target(noise_scheduler, latents, rectified, timesteps), target + change[prediction_type]
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_is_left_alone(prediction_type):
    noise_scheduler = scheduler(prediction_type)
    latents, noise, _, timesteps = random_input((4, 3, 8, 8), prediction_type)
    target = get_target(noise_scheduler, latents, noise, timesteps)
    rectified = dream_noise(lambda *_: target, noise_scheduler, latents, noise, timesteps, 1.0)
    torch.testing.assert_close(rectified, noise, rtol=1e-4, atol=1e-4)
