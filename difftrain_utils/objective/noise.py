"""The noise that a sample is mixed with: Gaussian, and the ways in which the field departs from it.

All of it is drawn on the CPU from (seed, k) and moved.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import generator_for, keyed_randn, randn


def sample_noise(
    config: NoiseConfig, seed: int, keys: Sequence[int], latents: torch.Tensor, group_size: int | None = None
) -> torch.Tensor:
    """The noise of the samples `keys`, of the latents' shape (batch, channels, …), float32.

    - `offset`: plus `offset` times a normal number for each channel (Guttenberg 2023, "Diffusion with Offset Noise")
    - `pyramid_discount`: plus coarser noise, weighted by discount^level (Whitaker 2023, "Multi-Resolution Noise for
      Diffusion Model Training"), divided by its standard deviation at each place, so that its variance is 1 everywhere;
      the original divides by the sample's own, which makes it depend on the sample
    - `immiscible`: each image of a group (`group_size` samples in a row, None: all) gets the noise of the group that is
      nearest to it in the sum over the group
      (Li et al. 2024, arXiv:2406.12303)
    """
    shape = latents.shape[1:]
    noise = keyed_randn(seed, "noise", keys, shape)
    if config.pyramid_discount:
        noise = torch.stack([_pyramid(noise[i], config, seed, k) for i, k in enumerate(keys)])
    if config.offset:
        per_channel = keyed_randn(seed, "offset_noise", keys, shape[:1])
        noise = noise + config.offset * per_channel.reshape(*per_channel.shape, *[1] * (len(shape) - 1))
    noise = to_device(noise, latents.device)
    if config.immiscible:
        size = group_size or len(keys)
        noise = torch.cat([assign(x, n) for x, n in zip(latents.split(size), noise.split(size), strict=True)])
    return noise


def perturb_input(config: NoiseConfig, seed: int, keys: Sequence[int], noise: torch.Tensor) -> torch.Tensor:
    """The noise to mix into the input while the target keeps the one given: ε + γξ, γ = `input_perturbation`.

    Ning et al. 2023, arXiv:2301.11706, algorithm 1.
    """
    if not config.input_perturbation:
        return noise
    return noise + config.input_perturbation * keyed_randn(seed, "perturbation", keys, noise.shape[1:], noise.device)


def assign(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The rows of `noise` in the order that makes the sum of distances to the rows of `latents` smallest."""
    from scipy.optimize import linear_sum_assignment  # an optional extra

    distance = torch.cdist(latents.flatten(1).float(), noise.flatten(1).float())
    _, order = linear_sum_assignment(distance.cpu().numpy())
    return noise[torch.as_tensor(order, device=noise.device)]


def _pyramid(noise: torch.Tensor, config: NoiseConfig, seed: int, k: int) -> torch.Tensor:
    """Level i is discount^i times noise of 1 / r^i of the size, enlarged, with a new r in [2, 4) each; of level 0,
    which has the full size, there is one besides the noise itself."""
    generator = generator_for(seed, "pyramid_noise", k)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[noise.ndim - 1]
    total, variance, size, level = 2**0.5 * noise, torch.tensor(2.0), noise.shape[1:], 0
    while min(size) > 1:
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
