"""A validation loss that can be compared between runs: it uses the same noise every time, and takes nothing from the
training stream."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import save_file

from difftrain_utils.config.config import Config
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.data.pairs import as_images
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.devices import to_device
from difftrain_utils.evaluation.held_out import held_out_batches
from difftrain_utils.families.family import Conditioning
from difftrain_utils.families.reference import Reference
from difftrain_utils.files import new_file
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.media import pairs, video
from difftrain_utils.media.media import media_of
from difftrain_utils.objective.first_frames import give_first_frames
from difftrain_utils.objective.loss import sample_losses, scale_masks
from difftrain_utils.objective.noise import unit_noise
from difftrain_utils.objective.preference import implicit_accuracies, preference_losses, preference_margins
from difftrain_utils.objective.schedule import Schedule


class Triples(NamedTuple):
    """Some of the fixed (row, noise, noise level) triples. Of pairs, tensors are of both in turn, (2·batch, …)."""

    keys: list[int]
    num_kept: int
    """How many of them, from the first on, are not another process's, too."""
    masks: torch.Tensor | None
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    """The noise levels, (batch,)."""
    times: torch.Tensor
    """What the model is told of them: the same, or of each frame."""
    conditioning: Conditioning
    target: torch.Tensor


def fixed_triples(accelerator: Accelerator, family, rows: MappedRows, config: Config) -> Iterator[Triples]:
    """This process's share of `evaluation.num_validation_samples` triples, on its device; triple j has the row j modulo
    their number, and lies in the noise level's bin j modulo `evaluation.num_validation_bins`.

    They depend on `evaluation.seed` alone, not on the run, so that runs can be compared; but noise whose frames are
    correlated (`noise.frame_correlation`) is so here, too, for without it is another process. The noise levels are
    equally spread over the angle φ = atan(s/a), from 0 (no noise) to π/2, or over those at which the denoiser is used
    (`noise_range`). As many clips as in training are given their first frame.
    """
    evaluation, schedule, are_pairs = config.evaluation, family.schedule, media_of(config.data) is pairs
    number, what = evaluation.num_validation_samples, "Validating, batches"
    for keys, num_kept, batch in held_out_batches(accelerator, rows, number, config, what):
        batch = send_to_device(batch, accelerator.device)
        batch = as_images(batch) if are_pairs else batch
        latents, conditioning = family.encode(batch, evaluation.seed, family.text_encoders, "validation_vae_noise")
        noise = unit_noise(config.noise, evaluation.seed, "validation_noise", keys, latents.shape[1:])
        noise = to_device(noise, accelerator.device)
        timesteps = validation_timesteps(evaluation, schedule, keys, family.noise_range).to(accelerator.device)
        if are_pairs:  # one noise and one noise level for both images
            noise, timesteps = noise.repeat_interleave(2, 0), timesteps.repeat_interleave(2)
        times, masks = timesteps, batch["masks"]
        if media_of(config.data) is video:
            purpose = "validation_first_frame"
            times, masks = give_first_frames(config.model, evaluation.seed, keys, latents, timesteps, purpose)
        noisy_latents = schedule.add_noise(latents, noise, times)
        target = schedule.target(latents, noise, times)
        yield Triples(keys, num_kept, masks, noisy_latents, timesteps, times, conditioning, target)


@torch.no_grad()
def validation_losses(
    accelerator: Accelerator, family, denoiser: torch.nn.Module, rows: MappedRows, config: Config
) -> torch.Tensor:
    """The losses of the `fixed_triples`, shape (`evaluation.num_validation_samples`,), float32 on the CPU, which the
    processes share out.

    The loss is the unweighted squared error of v = cos φ·ε - sin φ·x_0, (SNR + 1)·|x̂_0 - x_0|², whatever the model
    predicts; times the mask where the rows have masks.
    """
    schedule = family.schedule
    found = torch.zeros(config.evaluation.num_validation_samples, device=accelerator.device)
    for of_batch in fixed_triples(accelerator, family, rows, config):
        keys, num_kept, masks, noisy_latents, timesteps, times, conditioning, target = of_batch
        output = family.predict(denoiser, noisy_latents, times, conditioning)
        losses = (output - target).square()
        if masks is not None:
            losses *= scale_masks(masks, losses.shape[2:])
        losses = losses.flatten(1).mean(1)
        losses *= (schedule.snr(timesteps) + 1) / schedule.error_scale(timesteps)
        found[keys[:num_kept]] = losses[:num_kept]
    return accelerator.reduce(found, "sum").cpu()


@torch.no_grad()
def validation_preferences(
    accelerator: Accelerator,
    family,
    denoiser: torch.nn.Module,
    reference: Reference,
    rows: MappedRows,
    config: PreferenceConfig,
) -> dict[str, torch.Tensor]:
    """Of the `fixed_triples` of pairs the losses of training, and the implicit accuracies and margins that they are
    made of, each of the shape (`evaluation.num_validation_samples`,), float32 on the CPU."""
    schedule, names = family.schedule, ("loss", "implicit_accuracy", "margin")
    found = torch.zeros(len(names), config.evaluation.num_validation_samples, device=accelerator.device)
    for of_batch in fixed_triples(accelerator, family, rows, config):
        keys, num_kept, _, noisy_latents, timesteps, _, conditioning, target = of_batch
        output = family.predict(denoiser, noisy_latents, timesteps, conditioning)
        before = reference.predict(denoiser, noisy_latents, timesteps, conditioning)
        errors, reference_errors = (
            sample_losses(config.loss, schedule, predicted, target, timesteps) for predicted in (output, before)
        )
        margins = preference_margins(config.preference, errors, reference_errors)
        values = torch.stack([preference_losses(margins), implicit_accuracies(margins), margins])
        found[:, keys[:num_kept]] = values[:, :num_kept]
    found = accelerator.reduce(found, "sum").cpu()
    return {f"validation_{name}": values for name, values in zip(names, found, strict=True)}


def by_noise_level(name: str, losses: torch.Tensor, num_bins: int) -> dict[str, float | list[float]]:
    """{name: mean, name_bins: means from low to high noise} of `validation_losses`."""
    bins = losses.double().view(-1, num_bins).mean(0)
    return {name: bins.mean().item(), f"{name}_bins": bins.tolist()}


def save_validation_losses(losses: dict[str, torch.Tensor], num_images: int, num_bins: int, path: Path) -> None:
    """Write the losses of the triples by name, and the "image" and the "bin" of each. Raises RunError if it cannot."""
    triples = torch.arange(len(next(iter(losses.values()))), dtype=torch.int32)
    with new_file(path) as partial:
        save_file(losses | {"image": triples % num_images, "bin": triples % num_bins}, partial)


def validation_timesteps(
    config: EvaluationConfig, schedule: Schedule, keys: Iterable[int], noise_range: tuple[float, float] = (0.0, 1.0)
) -> torch.Tensor:
    """The timesteps whose noise level is that of the triples `keys`, or nearest to it: triple j lies in bin j modulo
    `evaluation.num_validation_bins` of the angle φ = atan(s/a), at a place drawn from (evaluation.seed, j). The bins
    divide the angles of `noise_range`, fractions of the schedule."""
    bins, num_timesteps = config.num_validation_bins, schedule.num_train_timesteps
    places = keyed_rand(config.seed, "validation_noise_level", keys)
    low, high = (_angle_at(schedule, fraction) for fraction in noise_range)
    angles = low + (torch.tensor([j % bins for j in keys]) + places) / bins * (high - low)
    if schedule.path == "cosine":
        return (angles / (math.pi / 2) * num_timesteps).float()
    if schedule.path == "linear":
        sigmas = angles.tan() / (1 + angles.tan())
        return (sigmas * num_timesteps).float()
    alphas, sigmas = schedule.alphas_and_sigmas(torch.arange(num_timesteps))
    nearest = (torch.atan2(sigmas, alphas)[None, :] - angles[:, None]).abs().argmin(1)
    first, end = (math.ceil(fraction * num_timesteps) for fraction in noise_range)
    return nearest.clamp(first, end - 1)


def _angle_at(schedule: Schedule, fraction: float) -> float:
    """φ = atan(s/a) at a fraction of the schedule: 0 and π/2 at its ends, also where the path `ddpm` has others."""
    if fraction in (0, 1):
        return fraction * math.pi / 2
    time = torch.tensor(fraction * schedule.num_train_timesteps, dtype=torch.float64)
    alphas, sigmas = schedule.alphas_and_sigmas(time if schedule.has_continuous_time else time.long())
    return torch.atan2(sigmas, alphas).item()
