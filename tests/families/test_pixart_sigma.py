import importlib.util
import json
import shutil

import pytest
import torch
from helpers import options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family

NAME = "builtin:tiny-pixart-sigma"


@pytest.fixture
def pixart_run(short_run) -> list[str]:
    return [*short_run, *options({"model.pretrained_model_name_or_path": NAME})]


def test_captions_are_padded_to_300_tokens_with_a_mask(pixart_run):
    conditioning = load_family(parse_config(pixart_run)).encode_prompts(["a red circle", None])
    assert conditioning["prompt_embeds"].shape == (2, 300, 64)
    lengths = [len("a red circle") + 1, 1]  # bytes, and the end
    assert torch.equal(conditioning["prompt_embeds_mask"], (torch.arange(300) < torch.tensor(lengths)[:, None]).long())


@torch.no_grad()
def test_padding_makes_no_difference(pixart_run):
    """So a cache may keep the captions alone; also where a step is computed with checkpoints of activations."""
    family = load_family(parse_config(pixart_run))
    denoiser, latents = family.load_denoiser().train(), torch.randn(2, 4, 8, 8)
    whole = family.encode_prompts(["a red circle", None])
    short = {name: value[:, :16].clone() for name, value in whole.items()}
    short["prompt_embeds"][short["prompt_embeds_mask"] == 0] = 100.0
    timesteps = torch.tensor([10, 900])
    expected = family.predict(denoiser, latents, timesteps, whole)
    torch.testing.assert_close(family.predict(denoiser, latents, timesteps, short), expected)
    denoiser.enable_gradient_checkpointing()
    with torch.enable_grad():
        torch.testing.assert_close(family.predict(denoiser, latents, timesteps, short), expected)


def test_a_transformer_that_is_told_sizes_is_refused(pixart_run, tmp_path):
    folder = shutil.copytree(builtin_checkpoint(NAME), tmp_path / "model")
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_additional_conditions": True}))
    with pytest.raises(ValueError, match="transformer: use_additional_conditions: a PixArtSigmaPipeline tells"):
        load_family(parse_config([*pixart_run, *options({"model.pretrained_model_name_or_path": folder})]))


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_tokenizer_of_sentencepiece_alone_names_the_extra(tmp_path):
    folder = shutil.copytree(builtin_checkpoint("builtin:tiny-pixart-sigma"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "T5Tokenizer"]}))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (folder / "tokenizer/spiece.model").write_bytes(b"")
    message = r"tokenizer: sentencepiece is not installed \(pip install -c constraints.txt -e '.\[sentencepiece\]'\)"
    with pytest.raises(InputError, match=message):
        load_family(parse_config(["--model.pretrained_model_name_or_path", str(folder), "--data.dataset", "d"]))
