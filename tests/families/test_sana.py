import inspect

import pytest
import torch
from diffusers import SanaPipeline
from helpers import assert_one_line, options, parse_config

from difftrain_utils.families.load import load_family


@pytest.fixture
def sana_run(short_run) -> list[str]:
    model = {"model.pretrained_model_name_or_path": "builtin:tiny-sana", "model.max_sequence_length": 24}
    return [*short_run, *options(model)]


@pytest.fixture
def family(sana_run):
    return load_family(parse_config(sana_run))


def test_the_autoencoder_has_no_posterior(family):
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    moments = family.encode_images(pixel_values)
    latents = family.part("vae").encode(pixel_values).latent
    assert moments.shape == (2, 2, 8, 4, 4) and not moments[:, 1].any()
    sampled = family.sample_latents(moments, torch.randn(2, 8, 4, 4))
    torch.testing.assert_close(sampled, latents * family.config_of("vae").scaling_factor)


def test_a_caption_has_the_instruction_before_it_and_nothing_has_none(family):
    """The state of the first token, then those of the last: the caption's own, which have seen the instruction."""
    caption, conditioning = "a red circle", family.encode_prompts(["a red circle", None, ""])
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    ids = family.part("tokenizer")("\n".join(instruction) + caption, return_tensors="pt").input_ids
    states = family.part("text_encoder")(ids).last_hidden_state[0]
    embeds, masks = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"]
    count = int(masks[0].sum())
    assert embeds.shape == (3, 24, 64) and count == 2 + len(caption)  # the last of the instruction is among them
    expected = torch.cat([states[:1], states[1 - count :]])
    torch.testing.assert_close(embeds[0, :count], expected, rtol=1e-4, atol=1e-4)
    begin = family.part("text_encoder")(ids[:, :1]).last_hidden_state[0]
    assert masks[1].tolist() == [1] + [0] * 23  # the beginning of a text alone
    torch.testing.assert_close(embeds[1, :1], begin, rtol=1e-4, atol=1e-4)
    assert masks[2].sum() == 2


@torch.no_grad()
def test_padding_makes_no_difference(family):
    denoiser, latents = family.load_denoiser().train(), torch.randn(2, 8, 4, 4)
    whole = family.encode_prompts(["a red circle", None])
    short = {name: value[:, :16].clone() for name, value in whole.items()}
    short["prompt_embeds"][short["prompt_embeds_mask"] == 0] = 100.0
    timesteps = torch.tensor([10.0, 900.0])
    expected = family.predict(denoiser, latents, timesteps, whole)
    torch.testing.assert_close(family.predict(denoiser, latents, timesteps, short), expected)
    denoiser.enable_gradient_checkpointing()
    with torch.enable_grad():
        torch.testing.assert_close(family.predict(denoiser, latents, timesteps, short), expected)


def test_sides_are_multiples_of_32(sana_run, capsys):
    assert_one_line(
        [*sana_run, *options({"data.resolution": 40})], r"data.resolution: .* multiple of 32, got 40$", capsys
    )
