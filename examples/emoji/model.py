"""Make the checkpoint that configs/emoji.yaml trains from scratch: a PRXPixel of two and a half million weights.

    python examples/emoji/model.py data/emoji data/emoji-model

It attends to the words of the captions in that folder. Their encoder has random weights, too, and stays so: it gives
each word, after what was before it, a state of its own. Words that are in no caption are all the same to it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLTextConfig, Qwen3VLTextModel

SPECIALS = ["<pad>", "<unk>"]
WIDTH = 64  # of the states of words


def word_tokenizer(captions: list[str], max_length: int) -> PreTrainedTokenizerFast:
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]+", caption)})
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=max_length
    )


def make(captions: list[str], max_length: int = 16) -> PRXPixelPipeline:
    """Its tokens are patches of 8 x 8 pixels, and words."""
    tokenizer = word_tokenizer(captions, max_length)
    text_config = Qwen3VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1e4},
        initializer_range=WIDTH**-0.5,
    )
    transformer = PRXTransformer2DModel(
        in_channels=3,
        patch_size=8,
        context_in_dim=WIDTH,
        hidden_size=160,
        num_heads=5,
        depth=4,
        axes_dim=[16, 16],
        theta=10,  # for few places
        bottleneck_size=64,
        resolution_embeds=True,
    )
    return PRXPixelPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=1.5),
        Qwen3VLTextModel(text_config),
        tokenizer,
        default_sample_size=64,
        prompt_max_tokens=max_length,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="the folder that make.py wrote")
    parser.add_argument("checkpoint", type=Path, help="a folder for the checkpoint")
    arguments = parser.parse_args()
    try:
        lines = (arguments.images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        torch.manual_seed(0)
        make([json.loads(line)["text"] for line in lines]).save_pretrained(arguments.checkpoint)
    except (OSError, ValueError, KeyError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"a checkpoint in {arguments.checkpoint}")
