import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_dream_and_update_latents

from difftrain_utils.config.objective import StrategyConfig
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.dream import dream_noise
from difftrain_utils.objective.schedule import PREDICTION_TYPES, Schedule, append_dims


def schedule_of(prediction_type: str) -> Schedule:
    if prediction_type == "flow_prediction":
        return Schedule.of(FlowMatchEulerDiscreteScheduler())
    return Schedule.of(DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear"))


def random_input(shape, prediction_type):
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted = torch.randn(3, *shape, generator=generator)
    timesteps = torch.randint(1, 1000, shape[:1], generator=generator)
    return latents, noise, predicted, timesteps.float() if prediction_type == "flow_prediction" else timesteps


def rectify(predict, schedule, latents, noise, timesteps, p, denoiser=None, **fields):
    """With DREAM for all samples, unless the fields of the strategy say otherwise."""
    config = StrategyConfig(dream_training=True, dream_detail_preservation=p, **fields)
    denoiser, keys = denoiser or torch.nn.Identity(), range(len(latents))
    return dream_noise(config, schedule, denoiser, predict, latents, noise, timesteps, 0, keys)


@pytest.mark.parametrize("p", [0.0, 1.0, 10.0])
def test_equals_diffusers_for_epsilon(p):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    noise_scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    schedule, states = Schedule.of(noise_scheduler), torch.randn(5, 3, 8)
    latents, noise, _, timesteps = random_input((5, 4, 8, 8), "epsilon")
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    expected = compute_dream_and_update_latents(
        unet, noise_scheduler, timesteps, noise, noisy.clone(), noise.clone(), states, p
    )
    predict = lambda noisy_latents, t: unet(noisy_latents, t, states).sample  # noqa: E731
    rectified = rectify(predict, schedule, latents, noise, timesteps, p, unet)
    assert not rectified.requires_grad
    torch.testing.assert_close(schedule.add_noise(latents, rectified, timesteps), expected[0])
    torch.testing.assert_close(schedule.target(latents, rectified, timesteps), expected[1])


@pytest.mark.parametrize("shape", [(4, 3, 9), (4, 3, 8, 8), (4, 3, 2, 6, 6)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_new_targets_are_those_of_the_derivation(prediction_type, shape):
    schedule = schedule_of(prediction_type)
    latents, noise, output, timesteps = random_input(shape, prediction_type)
    a, s = (append_dims(x, latents) for x in schedule.alphas_and_sigmas(timesteps))
    noisy = schedule.add_noise(latents, noise, timesteps)
    rectified = rectify(lambda *_: output, schedule, latents, noise, timesteps, 2.0)
    predicted_noise = schedule.convert(output, noisy, timesteps, "epsilon")
    delta = (s / (a**2 + s**2).sqrt()) ** 2 * (noise - predicted_noise)
    torch.testing.assert_close(schedule.add_noise(latents, rectified, timesteps), noisy + s * delta)
    change = {"epsilon": delta, "v_prediction": a * delta, "sample": 0 * delta, "flow_prediction": delta}
    target = schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, rectified, timesteps), target + change[prediction_type])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_is_left_alone(prediction_type):
    schedule = schedule_of(prediction_type)
    latents, noise, _, timesteps = random_input((4, 3, 8, 8), prediction_type)
    target = schedule.target(latents, noise, timesteps)
    rectified = rectify(lambda *_: target, schedule, latents, noise, timesteps, 1.0)
    torch.testing.assert_close(rectified, noise, rtol=1e-4, atol=1e-4)


def test_the_share_of_samples_is_chosen_by_their_keys_and_the_others_keep_their_noise():
    schedule = schedule_of("epsilon")
    latents, noise, output, timesteps = random_input((400, 3, 2, 2), "epsilon")
    all_of_them = rectify(lambda *_: output, schedule, latents, noise, timesteps, 1.0)
    some = rectify(lambda *_: output, schedule, latents, noise, timesteps, 1.0, dream_probability=0.3)
    chosen = keyed_rand(0, "dream", range(400)) < 0.3
    assert torch.equal(some, torch.where(append_dims(chosen, noise), all_of_them, noise)) and 90 < chosen.sum() < 150
    assert not (all_of_them == noise).flatten(1).all(1).any()


def test_the_probe_sees_the_denoiser_in_eval_mode_and_leaves_it_in_training():
    schedule, denoiser, modes = schedule_of("epsilon"), torch.nn.Dropout(0.5), []
    latents, noise, output, timesteps = random_input((4, 3, 2, 2), "epsilon")

    def predict(noisy_latents, t):
        modes.append((denoiser.training, torch.is_grad_enabled()))
        assert torch.equal(noisy_latents, schedule.add_noise(latents, noise, timesteps)) and t is timesteps
        return output

    rectify(predict, schedule, latents, noise, timesteps, 1.0, denoiser)
    assert modes == [(False, False)] and denoiser.training
