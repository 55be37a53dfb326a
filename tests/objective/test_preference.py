"""Diffusion-DPO's loss, against the paper's code and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.config.preference import PreferenceLossConfig
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.preference import implicit_accuracies, preference_losses, preference_margins
from difftrain_utils.objective.schedule import Schedule

BETA = 2000.0


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def predictions() -> tuple[torch.Tensor, ...]:
    """The model's, the reference's and the target, of three pairs, chosen and rejected in turn."""
    target, noise = draw(6, 4, 8, 8), draw(6, 4, 8, 9)[..., :8]
    scales = torch.tensor([0.2, 0.21, 0.21, 0.2, 0.2, 0.2], dtype=torch.float64)[:, None, None, None]
    return target + scales * noise, target + 0.205 * noise, target


def margins_of(output: torch.Tensor, before: torch.Tensor, target: torch.Tensor, weighting: str = "uniform"):
    schedule = Schedule("ddpm", "epsilon", 10, torch.linspace(0.95, 0.05, 10, dtype=torch.float64))
    timesteps = torch.tensor([1, 4, 8]).repeat_interleave(2)
    config = LossConfig(weighting=weighting)
    errors = [sample_losses(config, schedule, x, target, timesteps) for x in (output, before)]
    return preference_margins(PreferenceLossConfig(BETA), *errors), schedule.snr(timesteps[::2])


def test_it_is_the_loss_of_the_papers_code(predictions):
    """Which has the chosen images of a batch first, and then the rejected ones."""
    output, before, target = (torch.cat([x[::2], x[1::2]]) for x in predictions)

    def difference(predicted: torch.Tensor) -> torch.Tensor:
        chosen, rejected = (predicted - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        return chosen - rejected

    inside = -0.5 * BETA * (difference(output) - difference(before))
    margins, _ = margins_of(*predictions)
    torch.testing.assert_close(margins, inside, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(preference_losses(margins), -1 * F.logsigmoid(inside), rtol=1e-12, atol=0)
    assert 0 < implicit_accuracies(margins).mean() < 1 and margins.abs().min() > 0.01
    assert implicit_accuracies(torch.tensor([2.0, -1.0, 0.0])).tolist() == [1, 0, 0.5]


def test_a_weighting_is_a_factor_of_the_margin(predictions):
    margins, snr = margins_of(*predictions)
    weighted, _ = margins_of(*predictions, "min_snr")
    torch.testing.assert_close(weighted, margins * snr.clamp(max=5) / snr)


def test_where_the_model_is_the_reference_it_is_ln_2_and_half_the_margins_gradient(predictions):
    output, _, target = predictions
    output.requires_grad_(True)
    margins, _ = margins_of(output, output.detach(), target)
    losses = preference_losses(margins)
    assert (losses == math.log(2)).all() and (implicit_accuracies(margins) == 0.5).all()
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(3)[:, None, None, None]
    expected = BETA / 4 * signs * 2 * (output - target).detach() / output[0].numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_its_limits():
    """A pair that is learned costs nothing and moves nothing; one that is lost costs its margin, and is pulled at with
    all of β/2."""
    margins = torch.tensor([800.0, -800.0], dtype=torch.float64, requires_grad=True)
    losses = preference_losses(margins)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    assert losses.tolist() == [0, 800] and gradient.tolist() == [0, -1]
