"""Which timesteps a run trains on: sample k's is a function of (config, seed, k).

Each density is the inverse of its distribution function applied to a uniform number, so that all of them can be drawn
independently or stratified over the batch.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from difftrain_utils.config.objective import TimestepsConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.objective.schedule import Schedule


def sample_timesteps(
    config: TimestepsConfig,
    schedule: Schedule,
    seed: int,
    keys: Sequence[int],
    batch_size: int,
    shift: float = 1.0,
    device=None,
    purpose: str = "timestep",
) -> torch.Tensor:
    """The timesteps of the samples `keys`, shape (len(keys),).

    int64 in [0, T), T = num_train_timesteps; float32 in (0, T) where time is continuous. On the path `linear` σ = t / T
    is shifted towards noise, to shift·σ / (1 + (shift - 1)·σ) (Esser et al. 2024, arXiv:2403.03206); not with the
    densities `log_normal` and `table`, which say where σ itself is. `batch_size` is the global one, which `stratified`
    divides (0, 1) by. A second time of a sample is drawn for another `purpose`.
    """
    num_timesteps, timesteps = schedule.num_train_timesteps, []
    for k in keys:
        fraction = quantile(config, schedule, uniform(seed, purpose, k, batch_size if config.stratified else None))
        if schedule.path == "linear" and config.density not in ("log_normal", "table"):
            fraction = shift * fraction / (1 + (shift - 1) * fraction)
        fraction = config.min + (config.max - config.min) * fraction
        timestep = num_timesteps * fraction
        timesteps.append(timestep if schedule.has_continuous_time else min(int(timestep), num_timesteps - 1))
    return to_device(torch.tensor(timesteps), device)


def quantile(config: TimestepsConfig, schedule: Schedule, u: float) -> float:
    """Where a density has the share `u` of its mass below it: a fraction of the schedule, from 0 to 1.

    - `uniform`
    - `logit_normal`: sigmoid of a normal number of mean `logit_mean`, sd `logit_std` (Esser et al. 2024, section 3.1)
    - `mode`: 1 - u - s(cos²(πu/2) - 1 + u), s = `mode_scale`, with 1 - u for u (ibid.)
    - `cosmap`: 1 - 1 / (tan(πu/2) + 1), the cosine schedule's (ibid.)
    - `log_normal`: the noise-to-signal ratio s/a is exp of a normal number of mean `p_mean`, sd `p_std` (Karras et al.
      2022, arXiv:2206.00364, table 1)
    - `table`: parts of equal width with the weights of `table`
    """
    if config.density == "logit_normal":
        return 1 / (1 + math.exp(-NormalDist(config.logit_mean, config.logit_std).inv_cdf(u)))
    if config.density == "mode":
        return u - config.mode_scale * (math.cos(math.pi * (1 - u) / 2) ** 2 - u)
    if config.density == "cosmap":
        return 1 - 1 / (math.tan(math.pi * u / 2) + 1)
    if config.density == "log_normal":
        return _fraction_of(schedule, NormalDist(config.p_mean, config.p_std).inv_cdf(u))
    if config.density == "table":
        edges = [0.0, *itertools.accumulate(config.table)]
        part = min(bisect.bisect_right(edges, u * edges[-1]), len(config.table)) - 1
        return (part + (u * edges[-1] - edges[part]) / config.table[part]) / len(config.table)
    return u


def uniform(seed: int, purpose: str, k: int, batch_size: int | None) -> float:
    """A number in (0, 1) for sample k; stratified, each batch has one in each of batch_size equal parts."""
    number = generator_for(seed, purpose, k).random()
    if batch_size is not None:
        step, position = divmod(k, batch_size)
        part = int(generator_for(seed, f"{purpose}_strata", step).permutation(batch_size)[position])
        number = (part + number) / batch_size
    return min(max(number, 1e-9), 1 - 1e-9)


def _fraction_of(schedule: Schedule, log_sigma: float) -> float:
    """The fraction of the schedule whose noise-to-signal ratio s/a has this logarithm, or is nearest to it."""
    if schedule.path == "linear":
        return 1 / (1 + math.exp(-log_sigma))
    if schedule.path == "cosine":
        return math.atan(math.exp(log_sigma)) * 2 / math.pi
    alphas_cumprod = schedule.alphas_cumprod.double().clamp(1e-12, 1 - 1e-12)
    table = 0.5 * torch.log((1 - alphas_cumprod) / alphas_cumprod)
    return (torch.abs(table - log_sigma).argmin().item() + 0.5) / len(table)
