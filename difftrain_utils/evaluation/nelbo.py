"""The bound on the likelihood of held-out texts, with the same masks every time, so that runs can be compared."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.masking import MaskingConfig
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.masking import mask_tokens, masked_losses
from difftrain_utils.processes import share_out
from difftrain_utils.terminal import progress

BY_COUNT = MaskingConfig("count")


@torch.no_grad()
def validation_nelbos(
    accelerator: Accelerator,
    family,
    denoiser: torch.nn.Module,
    read_batch: Callable[[Sequence[int]], dict[str, Any]],
    evaluation: EvaluationConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of the NELBO, in nats per token, with fixed (text, number of masked tokens, mask) triples, and how many
    tokens each text has: both of shape (`evaluation.num_validation_samples`,), float32 on the CPU.

    `read_batch` gives the texts of triples: a batch of `Samples`, of "tokens", "maskable", "attention_mask" and
    "num_tokens". Of triple
    j's tokens the share that is masked lies in bin j modulo `evaluation.num_validation_bins` of (0, 1]; that and the
    mask depend on (`evaluation.seed`, j) alone, not on the run, nor on `masking`. The processes share the triples out.
    """
    found = torch.zeros(2, evaluation.num_validation_samples, device=accelerator.device)
    batches = share_out(accelerator, found.shape[1], evaluation.batch_size)
    for keys, num_kept in progress(batches, len(batches), "Validating, batches"):
        batch = send_to_device(read_batch(keys), accelerator.device)
        tokens, maskable = batch["tokens"], batch["maskable"]
        fractions = validation_fractions(evaluation, keys).to(accelerator.device)
        noisy_tokens, masked = mask_tokens(
            BY_COUNT, tokens, maskable, fractions, evaluation.seed, keys, family.mask_token_id, "validation_mask"
        )
        logits = family.predict(denoiser, noisy_tokens, batch["attention_mask"])
        losses = masked_losses(BY_COUNT, logits, tokens, masked, maskable, fractions, family.mask_token_id)
        losses *= maskable.sum(1) / batch["num_tokens"]  # a text's own; tokens that fill up a sample add nothing to it
        found[:, keys[:num_kept]] = torch.stack([losses, batch["num_tokens"]])[:, :num_kept]
    nats, num_tokens = accelerator.reduce(found, "sum").cpu()
    return nats, num_tokens


def validation_fractions(evaluation: EvaluationConfig, keys: Sequence[int]) -> torch.Tensor:
    """The share of the tokens that is masked in the triples `keys`, shape (len(keys),), in (0, 1]."""
    bins = evaluation.num_validation_bins
    places = keyed_rand(evaluation.seed, "validation_mask_fraction", keys)
    return ((torch.tensor([j % bins for j in keys]) + 1 - places) / bins).float()


def by_mask_fraction(
    name: str, nats: torch.Tensor, num_tokens: torch.Tensor, num_bins: int
) -> dict[str, float | list[float]]:
    """What the `validation_nelbos` say, longer texts counting for more:

    - NAME: nats per token, at most; NAME_bins: by the share that is masked, from few to all
    - NAME_bits: bits per token, at most; NAME_perplexity: of a token, at most
    - NAME_text: nats of a text, at most
    """
    nats, num_tokens = (nats * num_tokens).double().view(-1, num_bins), num_tokens.double().view(-1, num_bins)
    per_token = (nats.sum() / num_tokens.sum()).item()
    return {
        name: per_token,
        f"{name}_bins": (nats.sum(0) / num_tokens.sum(0)).tolist(),
        f"{name}_bits": per_token / math.log(2),
        f"{name}_perplexity": torch.tensor(per_token, dtype=torch.float64).exp().item(),  # inf, where math.exp raises
        f"{name}_text": nats.mean().item(),
    }
