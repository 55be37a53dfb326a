import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.keyed_random import keyed_rand, keyed_randn
from difftrain_utils.objective.contrastive import contrastive_losses, others_of
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.schedule import Schedule

FLOW = Schedule.of(FlowMatchEulerDiscreteScheduler())


def drawn(count: int, *shape: int) -> list[torch.Tensor]:
    """An output, latents, noise and timesteps."""
    tensors = [keyed_randn(0, purpose, range(count), shape) for purpose in ("output", "latents", "noise")]
    return [*tensors, 1000 * keyed_rand(0, "timesteps", range(count))]


def test_the_others_are_the_next_of_the_group_that_are_told_something_else():
    conditions = ["a", "b", "b", None, "c", "c", "a", "a"]
    others, has_other = others_of(conditions)
    assert others.tolist() == [1, 3, 3, 3, 6, 6, 1, 1] and has_other.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    others, has_other = others_of(conditions, group_size=4)
    assert others.tolist() == [1, 3, 3, 3, 6, 6, 4, 4]
    others, has_other = others_of(conditions, group_size=2)
    assert others.tolist() == [1, 0, 3, 3, 4, 5, 6, 7] and has_other.tolist() == [1, 1, 1] + [0] * 5
    for half in (slice(0, 4), slice(4, 8)):  # splitting the batch between groups changes nothing
        of_half = others_of(conditions[half], group_size=4)[0] + half.start
        assert of_half.tolist() == others_of(conditions, group_size=4)[0][half].tolist()


def test_it_is_the_papers_term_for_each_sample():
    """Equation 4 of arXiv:2506.05350 by numpy: -λ|v - (ε̃ - x̃)|², as the mean over the elements."""
    output, latents, noise, timesteps = drawn(4, 2, 3, 3)
    config, conditions = LossConfig(contrastive=0.05), [5, 7, None, 5]
    losses = contrastive_losses(config, FLOW, output, latents, noise, timesteps, conditions)
    v, x, eps = (tensor.numpy() for tensor in (output, latents, noise))
    of_others = [((v[i] - (eps[j] - x[j])) ** 2).mean() for i, j in ((0, 1), (1, 2), (3, 1))]
    np.testing.assert_allclose(losses.numpy(), -0.05 * np.insert(of_others, 2, 0), rtol=1e-6)


def test_the_others_target_is_at_the_samples_own_timestep_and_weighed_as_its_own():
    schedule = Schedule.of(DDPMScheduler(prediction_type="v_prediction"))
    output, latents, noise, timesteps = drawn(2, 1, 4, 4)
    timesteps, masks = timesteps.long(), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = LossConfig(contrastive=0.5, weighting="min_snr", type="l1")
    losses = contrastive_losses(config, schedule, output, latents, noise, timesteps, [0, 1], masks=masks)
    target = DDPMScheduler().get_velocity(latents.flip(0), noise.flip(0), timesteps)
    expected = -0.5 * sample_losses(config, schedule, output, target, timesteps, masks)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_the_best_prediction_is_the_targets_mean_less_that_of_the_others(weight):
    """By the closed form (E u - λ E ũ) / (1 - λ), of one prediction for many samples of two conditions."""
    _, latents, noise, timesteps = drawn(2000, 1, 1, 2)
    latents = latents + torch.tensor([1.0, 3.0])[torch.arange(2000) % 2].reshape(-1, 1, 1, 1)
    conditions, config = [0, 1] * 1000, LossConfig(contrastive=weight)
    of_one = torch.arange(0, 2000, 2)
    prediction = torch.zeros(1, 1, 2, requires_grad=True)
    target = noise - latents

    def loss() -> torch.Tensor:
        output = prediction.expand(2000, 1, 1, 2)
        away = contrastive_losses(config, FLOW, output, latents, noise, timesteps, conditions)
        return (sample_losses(config, FLOW, output, target, timesteps) + away)[of_one].mean()

    optimizer = torch.optim.LBFGS([prediction])
    optimizer.step(lambda: (optimizer.zero_grad(), (value := loss()).backward(), value)[-1])
    mean, of_others = target[0::2].mean(0), target[1::2].mean(0)
    torch.testing.assert_close(prediction.detach(), (mean - weight * of_others) / (1 - weight), rtol=1e-4, atol=1e-4)
