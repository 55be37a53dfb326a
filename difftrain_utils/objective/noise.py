"""The noise that a sample is mixed with: Gaussian, and the ways in which the field departs from it.

All of it is drawn on the CPU from (seed, k) and moved.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.config.text_to_video import VideoNoiseConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import generator_for, keyed_randn, randn
from difftrain_utils.objective.schedule import append_dims


def sample_noise(
    config: NoiseConfig,
    seed: int,
    keys: Sequence[int],
    latents: torch.Tensor,
    conditions: Sequence[Hashable],
    group_size: int | None = None,
) -> torch.Tensor:
    """The noise of the samples `keys`, of the latents' shape (batch, channels, …), float32.

    - `frame_correlation`: see `correlate_frames`
    - `offset`: plus `offset` times a normal number for each channel (Guttenberg 2023, "Diffusion with Offset Noise"),
      of a video one for all its frames: it is the mean of the whole clip that other noise leaves to be seen, and of
      one for each frame the mean would have a variance of offset² / frames
    - `pyramid_discount`: plus coarser noise, weighted by discount^level (Whitaker 2023, "Multi-Resolution Noise for
      Diffusion Model Training"), divided by its standard deviation at each place, so that its variance is 1 everywhere;
      the original divides by the sample's own, which makes it depend on the sample. A video's coarser noise has fewer
      frames, too, so that it is slow where it is coarse; that of a still is an image's
    - `pairing`: which latents get which of that noise, see `pair`, or `knn`: each the nearest of `knn_candidates` that
      are drawn for it alone (Li et al. 2025, arXiv:2505.18521)
    """
    noise = _draw(config, seed, keys, latents)
    if config.pairing == "knn":
        nearest = _distances(latents, noise)
        for number in range(1, config.knn_candidates):
            candidate = _draw(config, seed, keys, latents, f"_{number}")
            distances = _distances(latents, candidate)
            noise = torch.where(append_dims(distances < nearest, noise), candidate, noise)
            nearest = torch.minimum(nearest, distances)
    elif config.pairing is not None:
        noise = pair(latents, noise, conditions if config.pairing == "transport" else None, group_size)
    return noise


def _draw(
    config: NoiseConfig, seed: int, keys: Sequence[int], latents: torch.Tensor, candidate: str = ""
) -> torch.Tensor:
    """Noise of the latents' shape, and on their device; `candidate` tells those of one key from each other."""
    shape = latents.shape[1:]
    noise = unit_noise(config, seed, f"noise{candidate}", keys, shape)
    if config.pyramid_discount:
        generators = [generator_for(seed, f"pyramid_noise{candidate}", k) for k in keys]
        noise = torch.stack([_pyramid(*of_one, config) for of_one in zip(noise, generators, strict=True)])
    if config.offset:
        per_channel = keyed_randn(seed, f"offset_noise{candidate}", keys, shape[:1])
        noise = noise + config.offset * append_dims(per_channel, noise)
    return to_device(noise, latents.device)


def unit_noise(config: NoiseConfig, seed: int, purpose: str, keys: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Gaussian noise of the shape (len(keys), *shape), of mean 0 and variance 1, float32 on the CPU: all of it
    independent, or with `frame_correlation`, (channels, frames, height, width) of which frames have a part in
    common."""
    if config.frame_correlation is None:
        return keyed_randn(seed, purpose, keys, shape)
    channels, frames, *sides = shape
    return correlate_frames(config, keyed_randn(seed, purpose, keys, (channels, frames + 1, *sides)))


def correlate_frames(config: VideoNoiseConfig, noise: torch.Tensor) -> torch.Tensor:
    """Noise (batch, channels, frames, height, width) whose frames are correlated, of independent `noise` of one frame
    more, its first. With α = `frame_correlation_strength` and ε_i independent,

    - `mixed`: frame i is (α·ε_0 + ε_i) / sqrt(1 + α²), and the correlation of any two α² / (1 + α²)
    - `progressive`: frame i is (α·frame i-1 + ε_i) / sqrt(1 + α²), the one before the first being ε_0, and the
      correlation of two frames n apart (α / sqrt(1 + α²))^n

    (Ge et al. 2023, "Preserve Your Own Correlation", arXiv:2305.10474, section 4). Each element's variance is 1.
    """
    first, *others = noise.unbind(2)
    norm, frames = math.hypot(1, config.frame_correlation_strength), [first]
    for own in others:
        before = first if config.frame_correlation == "mixed" else frames[-1]
        frames.append((config.frame_correlation_strength * before + own) / norm)
    return torch.stack(frames[1:], 2)


def _distances(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The squared distance of each sample's latents and noise, (batch,)."""
    return (latents - noise).square().flatten(1).sum(1)


def perturb_input(config: NoiseConfig, seed: int, keys: Sequence[int], noise: torch.Tensor) -> torch.Tensor:
    """The noise to mix into the input while the target keeps the one given: ε + γξ, γ = `input_perturbation`, and ξ
    another draw of `unit_noise`.

    Ning et al. 2023, arXiv:2301.11706, algorithm 1.
    """
    if not config.input_perturbation:
        return noise
    other = to_device(unit_noise(config, seed, "perturbation", keys, noise.shape[1:]), noise.device)
    return noise + config.input_perturbation * other


def pair(
    latents: torch.Tensor,
    noise: torch.Tensor,
    conditions: Sequence[Hashable] | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The rows of `noise`, (batch, channels, …), in another order within each group (`group_size` rows, None: all).

    Without `conditions` that which makes the sum of the distances to the rows of `latents` smallest (Li et al. 2024,
    arXiv:2406.12303). With them the exact transport plan, the least sum of squared distances, among the rows whose
    conditions are equal (Cheng and Schwing 2025, arXiv:2503.10636: others cost infinitely much), so that the noise of
    each condition stays Gaussian.
    """
    from scipy.optimize import linear_sum_assignment  # an optional extra

    size, power = group_size or len(latents), 1 if conditions is None else 2
    of_conditions = [None] * len(latents) if conditions is None else conditions
    rows: dict[Hashable, list[int]] = {}
    for i, condition in enumerate(of_conditions):
        rows.setdefault((i // size, condition), []).append(i)
    order = list(range(len(latents)))
    for among in rows.values():
        if len(among) > 1:
            of_latents, of_noise = latents[among].flatten(1).float(), noise[among].flatten(1).float()
            cost = torch.cdist(of_latents, of_noise).pow(power)
            for i, j in zip(among, linear_sum_assignment(cost.cpu().numpy())[1], strict=True):
                order[i] = among[j]
    return noise[order]


def _pyramid(noise: torch.Tensor, generator: np.random.Generator, config: NoiseConfig) -> torch.Tensor:
    """Level i is discount^i times noise of 1 / r^i of the size, enlarged, with a new r in [2, 4) each; of level 0,
    which has the full size, there is one besides the noise itself. The last level is that of which a side is 1, as in
    the original, or of a signal its length; frames that are 1 stay so."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[noise.ndim - 1]
    total, variance, size, level = 2**0.5 * noise, torch.tensor(2.0), noise.shape[1:], 0
    while min(size[-2:]) > 1:
        level += 1
        factor = 2 + 2 * generator.random()
        size = [max(1, int(side / factor**level)) for side in noise.shape[1:]]
        coarse = randn(generator, 1, noise.shape[0], *size)
        weight = config.pyramid_discount**level
        total = total + weight * F.interpolate(coarse, noise.shape[1:], mode=mode)[0]
        variance = variance + weight**2 * _variance_of_enlarged(size, noise.shape[1:])
    return total / variance.sqrt()


def _variance_of_enlarged(size: Sequence[int], to: Sequence[int]) -> torch.Tensor:
    """The variance at each place of white noise that is enlarged linearly, of the shape `to`: the sum of the squares of
    the weights, which is a product over the dimensions."""
    variance = torch.ones(())
    for side, to_side in zip(size, to, strict=True):
        weights = F.interpolate(torch.eye(side)[None], to_side, mode="linear")[0]  # (side, to_side)
        variance = variance[..., None] * weights.square().sum(0)
    return variance
