"""What is Lumina2's own: the system prompt, which nothing has not, and what a dynamic shift is a function of."""

import pytest
import torch
from helpers import options, parse_config

from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family

FIELDS = {"model.pretrained_model_name_or_path": "builtin:tiny-lumina2", "model.max_sequence_length": 80}


@pytest.fixture
def lumina_run(short_run) -> list[str]:
    return [*short_run, *options(FIELDS)]


@pytest.fixture
def family(lumina_run):
    return load_family(parse_config(lumina_run))


def test_nothing_has_no_system_prompt_and_the_empty_caption_has(family):
    empty, null = (family.encode_prompts([text]) for text in ("", None))
    assert null["prompt_embeds_mask"].sum() == 1, "the token that begins a text"
    assert empty["prompt_embeds_mask"].sum() > family.num_system_tokens > 1
    assert not torch.allclose(empty["prompt_embeds"][:, 1], null["prompt_embeds"][:, 1])


def test_a_dynamic_shift_knows_no_size(family):
    """The pipeline takes the channels of the latents for their number of tokens."""
    assert family.mu(8, 8) == family.mu(64, 128) == pytest.approx(0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256))


def test_captions_are_padded_to_256_tokens(lumina_run):
    family = load_family(parse_config([*lumina_run, "--model.max_sequence_length", "null"]))
    assert family.encode_prompts(["a red circle"])["prompt_embeds_mask"].shape == (1, 256)


@pytest.mark.parametrize("length", [41, 300])
def test_lengths_without_a_place_for_captions_are_refused(lumina_run, length):
    """The system prompt would be all of each caption, or the transformer would look for places that it has not."""
    with pytest.raises(InputError, match=rf"^model.max_sequence_length: must be from \d+ to 299 for .*, got {length}$"):
        load_family(parse_config([*lumina_run, *options({"model.max_sequence_length": length})]))


@torch.no_grad()
def test_the_longest_captions_have_places(lumina_run):
    family = load_family(parse_config([*lumina_run, *options({"model.max_sequence_length": 299})]))
    conditioning = family.encode_prompts(["a" * 500])
    output = family.predict(family.load_denoiser(), torch.randn(1, 4, 4, 4), torch.ones(1), conditioning)
    assert conditioning["prompt_embeds_mask"].all() and output.isfinite().all()


def test_another_vae_is_refused(family, lumina_run, monkeypatch):
    """The pipeline makes latents of an eighth of the size, whatever its VAE does."""
    monkeypatch.setattr(type(family), "vae_scale_factor", 4)
    with pytest.raises(InputError, match=r"vae makes 1/4 of the size, and a Lumina2Pipeline takes 1/8"):
        load_family(parse_config(lumina_run))
