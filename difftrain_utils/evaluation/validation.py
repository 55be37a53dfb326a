"""A validation loss that can be compared between runs: it uses the same noise every time, and takes nothing from the
training stream."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.data.samples import read_row_or_substitute
from difftrain_utils.keyed_random import keyed_rand, keyed_randn
from difftrain_utils.media.image import to_square
from difftrain_utils.objective.schedule import Schedule


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, family, denoiser: torch.nn.Module, rows: MappedRows, config: Config, name: str
) -> dict[str, float | list[float]]:
    """The loss at fixed (image, noise, noise level) triples: {name: mean, name_bins: means from low to high noise}.

    The triples depend on `evaluation.seed` alone, not on the run, so that runs can be compared; the processes share
    them out. The noise levels are equally spread over the angle φ = atan(s/a), from 0 (no noise) to π/2. The loss is
    the unweighted squared error of v = cos φ·ε - sin φ·x_0, (SNR + 1)·|x̂_0 - x_0|², whatever the model predicts.
    """
    evaluation, schedule = config.evaluation, family.schedule
    bins = torch.zeros(evaluation.num_validation_bins, dtype=torch.float64, device=accelerator.device)
    mine = range(accelerator.process_index, evaluation.num_validation_samples, accelerator.num_processes)
    for start in range(0, len(mine), evaluation.batch_size):
        keys = mine[start : start + evaluation.batch_size]
        held_out = [read_row_or_substitute(rows, j % len(rows), config.data, evaluation.seed, j) for j in keys]
        pixel_values, crops = zip(*(to_square(image, config.data) for image, _ in held_out), strict=True)
        batch = {
            "keys": keys,
            "pixel_values": torch.stack(pixel_values).to(accelerator.device),
            "captions": [captions[0] for _, captions in held_out],
            "sizes": torch.tensor([crop.sizes for crop in crops], device=accelerator.device),
        }
        latents, conditioning = family.encode(batch, evaluation.seed, "validation_vae_noise")
        noise = keyed_randn(evaluation.seed, "validation_noise", keys, latents.shape[1:], accelerator.device)
        timesteps = validation_timesteps(evaluation, schedule, keys).to(accelerator.device)
        noisy_latents = schedule.add_noise(latents, noise, timesteps)
        target = schedule.target(latents, noise, timesteps)
        output = family.predict(denoiser, noisy_latents, timesteps, conditioning)
        losses = (output - target).square().flatten(1).mean(1)
        losses *= (schedule.snr(timesteps) + 1) / schedule.error_scale(timesteps)
        bins.index_add_(0, torch.tensor([j % len(bins) for j in keys], device=bins.device), losses.double())
    bins = accelerator.reduce(bins, "sum") * len(bins) / evaluation.num_validation_samples
    return {name: bins.mean().item(), f"{name}_bins": bins.tolist()}


def validation_timesteps(config: EvaluationConfig, schedule: Schedule, keys: Iterable[int]) -> torch.Tensor:
    """The timesteps whose noise level is that of the triples `keys`, or nearest to it: triple j lies in bin j modulo
    `evaluation.num_validation_bins` of the angle φ = atan(s/a), at a place drawn from (evaluation.seed, j)."""
    bins = config.num_validation_bins
    places = keyed_rand(config.seed, "validation_noise_level", keys)
    angles = (torch.tensor([j % bins for j in keys]) + places) / bins * (math.pi / 2)
    num_timesteps = schedule.num_train_timesteps
    if schedule.path == "linear":
        sigmas = angles.tan() / (1 + angles.tan())
        return (sigmas * num_timesteps).float()
    alphas, sigmas = schedule.alphas_and_sigmas(torch.arange(num_timesteps))
    return (torch.atan2(sigmas, alphas)[None, :] - angles[:, None]).abs().argmin(1)
