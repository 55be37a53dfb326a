"""Noisy latents and targets for a loop that has a scheduler of diffusers: see `objective/schedule.py`."""

import torch

from difftrain_utils.objective.schedule import Schedule


def add_noise(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The noisy latents x_t = a·latents + s·noise, of the latents' shape (batch, channels, …)."""
    return Schedule.of(noise_scheduler).add_noise(latents, noise, timesteps)


def get_target(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the denoiser has to predict, by the scheduler's prediction type; of the latents' shape.

    Raises:
        ValueError: it is none of `PREDICTION_TYPES`.
    """
    return Schedule.of(noise_scheduler).target(latents, noise, timesteps)
