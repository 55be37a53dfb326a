"""Contrastive flow matching: a prediction is pushed away from the targets of other samples (Stoica et al. 2025,
arXiv:2506.05350)."""

from collections.abc import Hashable, Sequence

import torch

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.devices import to_device
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.schedule import Schedule


def contrastive_losses(
    config: LossConfig,
    schedule: Schedule,
    output: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: Sequence[Hashable],
    group_size: int | None = None,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """-λ times the loss (`sample_losses`) of each sample's output against the target that the latents and the noise of
    another sample (`others_of`) have at its own timestep, shape (batch,); λ = `contrastive`.

    It is 0 for a sample that has no other. The paper's code makes up for those by their share of the batch, which
    would depend on how the batch is split.
    """
    others, has_other = others_of(conditions, group_size)
    others, has_other = to_device(others, latents.device), to_device(has_other, latents.device)
    target = schedule.target(latents[others], noise[others], timesteps)
    losses = sample_losses(config, schedule, output, target, timesteps, masks)
    return -config.contrastive * has_other * losses


def others_of(conditions: Sequence[Hashable], group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of another sample for each, int64, and whether it has one, each of shape (batch,) on the CPU: the next
    one of its group (`group_size` samples in a row, None: all; the first comes after the last) whose condition is
    another. A sample whose caption is dropped (None) has none: it is to be like all of them."""
    count = len(conditions)
    size, others = group_size or count, list(range(count))
    for i, condition in enumerate(conditions):
        first = i // size * size
        next_ones = (first + (i - first + step) % size for step in range(1, size))
        if condition is not None:
            others[i] = next((other for other in next_ones if conditions[other] != condition), i)
    return torch.tensor(others), torch.tensor([other != i for i, other in enumerate(others)])
