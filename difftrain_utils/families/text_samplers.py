"""Samplers of masked diffusion: how masked tokens are filled in, some at a time, by a model that predicts all of them.

`ancestral` follows the process that the model was trained on backwards (MDLM, Sahoo et al. 2024, arXiv:2406.07524):
each token is unmasked at a time of its own, whatever the model says. `confidence` unmasks in each step those that the
model is surest of, an equal number in all, or one more in the first ones (low-confidence remasking of LLaDA, Nie et al.
2025, arXiv:2502.09992).
"""

from collections.abc import Callable, Sequence

import torch

from difftrain_utils.devices import to_device

SAMPLERS = ("ancestral", "confidence")


@torch.no_grad()
def sample_tokens(
    predict: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    mask_token_id: int,
    generators: Sequence[torch.Generator],
    *,
    sampler: str,
    num_inference_steps: int,
    temperature: float = 1.0,
    block_length: int | None = None,
) -> torch.Tensor:
    """`tokens` (batch, length) with a token in place of each mask; the others stay.

    `predict` gives logits (batch, length, vocabulary) of tokens, and is called `num_inference_steps` times whatever the
    tokens are. Row i draws from `generators[i]`, which are on the CPU, alone. A `temperature` of 0 takes the likeliest
    token, of 1 one of the model's distribution. With `block_length` as many masks are filled in at a time, from left to
    right, each block in an equal share of the steps (LLaDA's semi-autoregressive sampling); null: all are one block.

    Raises:
        ValueError: the sampler is none of `SAMPLERS`, or there are fewer steps than blocks.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    # Of each mask: its block, the step that this begins at, and how many steps and masks this has.
    is_mask = tokens == mask_token_id
    num_masks = is_mask.sum(1, keepdim=True)
    block_length = block_length or tokens.shape[1]
    num_blocks = (-(-num_masks // block_length)).clamp(min=1)
    if num_inference_steps < num_blocks.max():
        raise ValueError(f"{num_inference_steps} steps are too few for {num_blocks.max()} blocks")
    blocks = (is_mask.cumsum(1) - 1) // block_length
    begin, end = (-(-number * num_inference_steps // num_blocks) for number in (blocks, blocks + 1))
    sizes = (num_masks - blocks * block_length).clamp(max=block_length)
    due = begin + (_rand(generators, tokens) * (end - begin)).long()  # by the ancestral sampler

    for step in range(num_inference_steps):
        logits = predict(tokens).float().clone()
        logits[..., mask_token_id] = -torch.inf
        draws = _rand(generators, tokens)
        found = _draw(logits, draws, temperature)
        waits = (tokens == mask_token_id) & (begin <= step) & (step < end)
        if sampler == "ancestral":
            is_filled = waits & (due == step)
        else:
            counts = sizes // (end - begin) + (step - begin < sizes % (end - begin))
            is_filled = waits & (_ranks(logits, found, waits) < counts)
        tokens = torch.where(is_filled, found, tokens)
    return tokens


def _rand(generators: Sequence[torch.Generator], tokens: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each token."""
    rows = [torch.rand(tokens.shape[1], generator=generator) for generator in generators]
    return to_device(torch.stack(rows), tokens.device)


def _draw(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """The token of each place that has the share `draws` of the distribution's mass before it or in it."""
    if temperature == 0:
        return logits.argmax(-1)
    # in float64, as the tokens of a large vocabulary are many small numbers
    sums = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, draws[..., None] * sums[..., -1:], right=True)[..., 0]


def _ranks(logits: torch.Tensor, found: torch.Tensor, waits: torch.Tensor) -> torch.Tensor:
    """The places that wait in the order of how probable the tokens found for them are, from 0."""
    confidence = logits.softmax(-1).gather(-1, found[..., None])[..., 0].masked_fill(~waits, -1)
    return confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
