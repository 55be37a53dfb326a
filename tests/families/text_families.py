"""What tests of text families share."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from difftrain_utils.config.config import Config
from difftrain_utils.config.model import LoraConfig, TextModelConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.families.load import load_family, trained_models

LENGTH = 24
LORA = {"lora": LoraConfig(rank=4, alpha=8)}


@dataclass
class ModelAlone(Config):
    """What a text family looks at of a config."""

    model: TextModelConfig
    data: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(sequence_length=LENGTH))
    train: TrainConfig = field(default_factory=TrainConfig)


def load(name: str, tokenizer=None, **model) -> tuple:
    """The family and the denoiser of a checkpoint."""
    config = ModelAlone(TextModelConfig(name, **model))
    family = load_family(config, tokenizer=tokenizer)
    return family, trained_models(family, config)["denoiser"].eval()


def tokens_and_mask(family) -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts, of which the second is padded."""
    tokens = torch.randint(6, family.vocab_size, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[1, 15:] = False
    return tokens, attention_mask


@torch.no_grad()
def assert_asked_as_transformers_asks(family, denoiser) -> None:
    """To the bit: with padding, without it, and alone; and what is padded does not matter."""
    tokens, attention_mask = tokens_and_mask(family)
    logits = family.predict(denoiser, tokens, attention_mask)
    assert logits.dtype == torch.float32 and logits.shape == (3, LENGTH, family.vocab_size)
    own = denoiser(input_ids=tokens, attention_mask=attention_mask).logits
    assert torch.equal(logits[attention_mask], own[attention_mask]) and logits.isfinite().all()
    for i in range(3):
        alone = family.predict(denoiser, tokens[i : i + 1], attention_mask[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i], rtol=0, atol=1e-6)
    others = torch.where(attention_mask, tokens, tokens.flip(0))
    assert torch.equal(family.predict(denoiser, others, attention_mask)[attention_mask], logits[attention_mask])


@torch.no_grad()
def assert_looks_both_ways(family, denoiser) -> None:
    """Each token's logits depend on the last token, and on the first one."""
    tokens, _ = tokens_and_mask(family)
    for changed, of in ((-1, 0), (0, -1)):
        others = tokens.clone()
        others[:, changed] = 6
        attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        pair = [family.predict(denoiser, x, attention_mask)[:, of] for x in (tokens, others)]
        assert (pair[0] - pair[1]).abs().amax(-1).min() > 1e-4
