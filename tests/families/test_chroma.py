"""What is Chroma's own: a mask over captions that has to be bool, and that gradient checkpointing would drop."""

import pytest
import torch
from helpers import assert_one_line, options, parse_config

from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for

FIELDS = {"model.pretrained_model_name_or_path": "builtin:tiny-chroma", "model.max_sequence_length": 24}
TIMESTEPS = torch.tensor([700.0, 30.0])


@pytest.fixture
def chroma_run(short_run) -> list[str]:
    return [*short_run, *options(FIELDS)]


@pytest.fixture
def family(chroma_run):
    return load_family(parse_config(chroma_run))


@pytest.fixture
def denoiser(family):
    torch.manual_seed(1)
    return fill_zeros(family.load_denoiser()).eval()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_mask_is_of_a_caption_and_the_token_after_it(family):
    """Of bytes, with one at the end; a caption that is cut has none after it."""
    mask = family.encode_prompts(["a circle", "a caption that is longer than that", None])["prompt_embeds_mask"]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [8 + 2, 24, 0 + 2]
    assert torch.equal(mask, torch.arange(24) < mask.sum(1, keepdim=True))


@torch.no_grad()
def test_padding_does_not_matter(family, denoiser, latents):
    """Neither what it is, nor how much of it there is: caches keep none."""
    conditioning = family.encode_prompts(["a circle", "a red square"])
    output = family.predict(denoiser, latents, TIMESTEPS, conditioning)
    embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"]
    other = torch.where(mask[..., None], embeds, torch.full_like(embeds, 7.0))
    assert torch.equal(output, family.predict(denoiser, latents, TIMESTEPS, conditioning | {"prompt_embeds": other}))
    cut = {name: value[:, : mask.sum(1).max()] for name, value in conditioning.items()}
    torch.testing.assert_close(family.predict(denoiser, latents, TIMESTEPS, cut), output)


def test_gradient_checkpointing_would_drop_the_mask(family, denoiser, latents):
    """As long as it does (diffusers 0.42), it is refused."""
    conditioning = family.encode_prompts(["a circle", "a red square"])
    output = family.predict(denoiser, latents, TIMESTEPS, conditioning)
    denoiser.enable_gradient_checkpointing()
    assert (family.predict(denoiser, latents, TIMESTEPS, conditioning) - output).abs().max() > 1e-3


def test_gradient_checkpointing_is_refused(chroma_run, capsys):
    message = "train.gradient_checkpointing: must be false for a ChromaPipeline, .*, got true"
    assert_one_line([*chroma_run, *options({"train.gradient_checkpointing": True})], message, capsys)


def test_longer_captions_than_the_pipelines_are_refused(chroma_run, capsys):
    message = "model.max_sequence_length: must be from 1 to 512 for this ChromaPipeline, got 513"
    assert_one_line([*chroma_run, *options({"model.max_sequence_length": 513})], message, capsys)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64)])
def test_training_shifts_as_the_pipeline_samples(family, height, width):
    """The second of two steps is at σ = 1/2, which it shifts to shift / (shift + 1)."""
    draws = [torch_generator_for(0, "evaluation", 0)]
    family.generate(family.load_denoiser(), ["x"], height, width, 2, 1.0, 0.0, draws)
    sigma = family.sampler.sigmas[1].item()
    assert family.shift(height // 4, width // 4) == pytest.approx(sigma / (1 - sigma), rel=1e-5)
