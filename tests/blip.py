"""A tiny model that says what it sees, as BLIP does, and what other tiny models are made of."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "<image>"]
WORDS += ["describe", "this", "image", "in", "one", "sentence", ".", "big", "red", "circle"]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = SIZES | {"image_size": 16, "patch_size": 8, "initializer_range": 1.0}
SIDES = {"height": 16, "width": 16}


def tokenizer() -> BertTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    return BertTokenizerFast(vocab=vocabulary, extra_special_tokens=["[DEC]", "<image>"])


def make_blip(folder: Path) -> Path:
    """Random weights, of which the captions are random words."""
    text = {
        "vocab_size": len(WORDS),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 128,
        "initializer_range": 1.0,
    }
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "is_decoder": True}
    torch.manual_seed(5)
    config = BlipConfig(text_config=SIZES | text, vision_config=VISION, projection_dim=8, image_text_hidden_size=8)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size=SIDES), tokenizer()).save_pretrained(folder)
    return folder
