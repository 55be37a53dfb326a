"""LLaDA: a Llama that attends in both directions (Nie et al. 2025, arXiv:2502.09992)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import masking_utils

from difftrain_utils.families.transformers_family import TransformersFamily


@dataclass
class LLaDA(TransformersFamily):
    """See `TextFamily`. The model is a `LlamaForCausalLM` with `is_causal` false in its config, which transformers
    takes for attention in both directions in all layers; a position's logits are of its own token, not of the next one.
    The checkpoint may be an autoregressive one. diffusers' `LLaDA2Pipeline(model, BlockRefinementScheduler(),
    tokenizer)` samples what is saved."""

    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    fixed: ClassVar[dict[str, Any]] = {"is_causal": False, "use_cache": False}

    def attention_masks(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return masking_utils.create_bidirectional_mask(**self.mask_arguments(attention_mask))
