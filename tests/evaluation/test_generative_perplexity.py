"""The perplexity of samples is what transformers' own loss says, of all tokens together."""

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generative_perplexity import generative_perplexity, load_scorer

LONGEST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal model of bytes, whose texts begin with a token of their own."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = make_tokenizer(TextDataConfig("d", tokenizer="bytes"))
    tokenizer.bos_token = tokenizer.eos_token
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=LONGEST, initializer_range=0.5)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_is_what_transformers_says(folder):
    scorer, texts = load_scorer(str(folder), torch.device("cpu")), ["abc", "", "a text that is too long", "é"]
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer(TextDataConfig("d", tokenizer="bytes"))
    nats = number = 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids][:LONGEST]
        if len(ids) > 1:
            tokens = torch.tensor([ids])
            nats += model(input_ids=tokens, labels=tokens).loss.item() * (len(ids) - 1)
        number += len(ids) - 1
    assert number == 3 + 0 + LONGEST - 1 + 2
    assert generative_perplexity(Accelerator(cpu=True), scorer, texts) == pytest.approx(
        math.exp(nats / number), rel=1e-5
    )
    assert math.isnan(generative_perplexity(Accelerator(cpu=True), scorer, [""]))


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^evaluation.perplexity_model: cannot use '.*nothing'"):
        load_scorer(str(tmp_path / "nothing"), torch.device("cpu"))
