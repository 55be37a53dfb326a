"""Masked language models: encoders with attention in both directions, which read a noisy text and guess what is masked
in it (Sahoo et al. 2024, MDLM, arXiv:2406.07524, trains such a one)."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

from difftrain_utils.families.transformers_family import TransformersFamily

ATTENTION = {  # by the class of the model
    "ModernBertForMaskedLM": ("attn.Wqkv", "attn.Wo"),
    "BertForMaskedLM": ("query", "key", "value", "attention.output.dense"),
}


@dataclass
class MaskedLM(TransformersFamily):
    """See `TextFamily`. The model is not told how much is masked: it sees it (MDLM, section 3.5)."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return ATTENTION[self.class_name]

    def attention_masks(self, attention_mask: torch.Tensor) -> Any:
        """ModernBERT's layers look at all, or at a window, and take a mask for each kind."""
        arguments = self.mask_arguments(attention_mask)
        full = masking_utils.create_bidirectional_mask(**arguments)
        if self.class_name != "ModernBertForMaskedLM":
            return full
        window = masking_utils.create_bidirectional_sliding_window_mask(**arguments)
        return {"full_attention": full, "sliding_attention": window}
