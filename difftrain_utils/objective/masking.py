"""Masked diffusion of tokens: what is masked, and the bound on the likelihood that its loss estimates.

A text of n tokens is masked position by position, each with probability m(t) = 1 - α_t at time t in (0, 1]. The
negative evidence lower bound (NELBO) of a model p of the masked tokens is, in nats (MDLM, Sahoo et al. 2024,
arXiv:2406.07524, equation 10, there of one token),

    ∫₀¹ m'(t)/m(t) E[ Σ over the masked positions i of -log p(x_i | x_t) ] dt

It does not depend on the schedule m, and so equals its mean over the number of masked tokens (LLaDA, Nie et al. 2025,
arXiv:2502.09992, equation 6), with j uniform in 1..n and j of the positions masked:

    E[ n/j Σ over the masked positions i of -log p(x_i | x_t) ]

Both estimators, `time` and `count`, draw one mask a sample. All that is drawn for sample k depends on (seed, k).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from difftrain_utils.config.masking import MaskingConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.timesteps import uniform


def mask_fractions(config: MaskingConfig, seed: int, keys: Sequence[int], batch_size: int, device=None) -> torch.Tensor:
    """The share of each sample's tokens that is to be masked, shape (len(keys),), float32 in (0, 1].

    A batch of `batch_size`, the global one, has one sample in each of as many equal parts of time; with
    `masking.antithetic` it is half as many parts, and sample 2i + 1 has 1 - u where 2i has u.
    """
    if config.antithetic:
        halves = [uniform(seed, "mask_fraction", k // 2, batch_size // 2) for k in keys]
        times = [u if k % 2 == 0 else 1 - u for k, u in zip(keys, halves, strict=True)]
    else:
        times = [uniform(seed, "mask_fraction", k, batch_size) for k in keys]
    if config.estimator == "time":
        times = [max(t, config.eps) for t in times]
        if config.schedule == "cosine":  # of MD4, Shi et al. 2024, arXiv:2406.04329
            times = [math.sin(math.pi / 2 * t) for t in times]
    return to_device(torch.tensor(times, dtype=torch.float32), device)


def cut_lengths(
    config: MaskingConfig, maskable: torch.Tensor, attention_mask: torch.Tensor, seed: int, keys: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`maskable` and `attention_mask`, both (batch, length) bool, of which `masking.random_length_share` of the samples
    end after r of their maskable tokens, r uniform in 1..n: what follows is neither seen nor learned."""
    if config.random_length_share == 0:
        return maskable, attention_mask
    draws = to_device(keyed_rand(seed, "random_length", keys, (2,), np.float32), maskable.device)
    ordinals = maskable.cumsum(1)
    lengths = _share_of(ordinals[:, -1], 1 - draws[:, 1]).clamp(min=1)
    is_kept = (draws[:, :1] >= config.random_length_share) | (ordinals - maskable.long() < lengths[:, None])
    return maskable & is_kept, attention_mask & is_kept


def mask_tokens(
    config: MaskingConfig,
    tokens: torch.Tensor,
    maskable: torch.Tensor,
    fractions: torch.Tensor,
    seed: int,
    keys: Sequence[int],
    mask_token_id: int,
    purpose: str = "mask",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (batch, length) with the mask token in some of the `maskable` positions, and which these are, bool.

    With the estimator `time` each is masked with the probability that `fractions`, (batch,), says; with `count` that
    share of a sample's n is, rounded up: of a share uniform in (0, 1], a number uniform in 1..n.
    """
    draws = to_device(keyed_rand(seed, purpose, keys, tokens.shape[1:], np.float32), tokens.device)
    if config.estimator == "time":
        masked = (draws < fractions[:, None]) & maskable
    else:
        order = draws.masked_fill(~maskable, 1).argsort(dim=1, stable=True)  # draws are below 1
        ranks = order.argsort(dim=1)
        masked = (ranks < _share_of(maskable.sum(1), fractions)[:, None]) & maskable
    return torch.where(masked, mask_token_id, tokens), masked


def masked_losses(
    config: MaskingConfig,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    masked: torch.Tensor,
    maskable: torch.Tensor,
    fractions: torch.Tensor,
    mask_token_id: int,
) -> torch.Tensor:
    """The estimate of each sample's NELBO in nats per maskable token, shape (batch,), float32, of `logits` (batch,
    length, vocabulary) for the masked tokens.

    Only masked positions count (what is seen is carried over), and the mask token is never predicted. The mean is over
    a sample's own maskable tokens; a sample without any has a loss of 0.
    """
    nats = _masked_nats(logits, tokens, masked, mask_token_id).sum(1)
    if config.estimator == "count":
        return nats / masked.sum(1).clamp(min=1)  # n/j, over n
    weights = 1 / fractions
    if config.schedule == "cosine":  # m'/m of m = sin(πt/2)
        weights = math.pi / 2 * ((1 - fractions) * (1 + fractions)).sqrt() * weights
    return weights * nats / maskable.sum(1).clamp(min=1)


def exact_nelbo(
    log_probs_of: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """The NELBO of each row of `tokens` (batch, length) in nats, shape (batch,), float64: the sum over all
    2^length - 1 masks, for short texts. `log_probs_of` gives log-probabilities (batch, length, vocabulary) of masked
    tokens (batch, length). A mask of j of n positions counts 1 / (j·C(n, j)), its probability by the count times
    n/j."""
    length = tokens.shape[1]
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    for number in range(1, 2**length):
        masked = torch.tensor([bool(number >> i & 1) for i in range(length)], device=tokens.device)
        count = number.bit_count()
        log_probs = log_probs_of(torch.where(masked, mask_token_id, tokens)).double()
        nats = -log_probs.gather(2, tokens[..., None])[:, masked, 0].sum(1)
        total += nats / (count * math.comb(length, count))
    return total


def _masked_nats(logits: torch.Tensor, tokens: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """-log p of each masked token, 0 elsewhere, (batch, length)."""
    logits = logits.float().clone()
    logits[..., mask_token_id] = -torch.inf
    nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
    return torch.where(masked, nats, 0.0)


def _share_of(numbers: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """A fraction in (0, 1] of whole numbers n, rounded up: in 1..n."""
    return (fractions * numbers).ceil().long().minimum(numbers).maximum(numbers.clamp(max=1))
