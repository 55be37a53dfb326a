"""What is Flux.2 klein's own: latents in patches with a batch norm, and a shift by the size and the steps."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from helpers import CACHES, assert_one_line, options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.families.flux2_klein import NUM_STEPS
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for

FIELDS = {"model.pretrained_model_name_or_path": "builtin:tiny-flux2-klein", "model.max_sequence_length": 72}


@pytest.fixture
def klein_run(short_run) -> list[str]:
    return [*short_run, *options(FIELDS)]


def draws() -> list[torch.Generator]:
    return [torch_generator_for(0, "evaluation", 0)]


@pytest.mark.parametrize("fields", [{}, CACHES], ids=["plain", "caches"])
def test_patches_are_normalised_in_float32_whatever_the_vae_is_in(klein_run, fields):
    """And without the VAE in memory where its work is cached."""
    family = load_family(parse_config([*klein_run, *options(fields)]))
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    family.move_frozen_parts(SimpleNamespace(device="cpu", mixed_precision="bf16"), TrainConfig())
    normalised = family.normalise(latents)
    assert normalised.shape == (2, 16, 3, 4)
    assert ("vae" in family._parts) == (not fields)
    vae = AutoencoderKLFlux2.from_pretrained(builtin_checkpoint("builtin:tiny-flux2-klein"), subfolder="vae")
    patches = torch.nn.functional.pixel_unshuffle(latents, 2)  # of a channel, those beside each other
    torch.testing.assert_close(normalised, vae.eval().bn(patches))


def test_sizes_are_of_patches(klein_run, capsys):
    family = load_family(parse_config(klein_run))
    assert (family.size_multiple, family.num_tokens(4, 4)) == (8, 16)
    latents = family.sample_latents(family.encode_images(torch.zeros(1, 3, 32, 48)), torch.zeros(()))
    assert latents.shape == (1, 16, 4, 6)
    message = "data.resolution: .* needs a multiple of 8, got 36"
    assert_one_line([*klein_run, *options({"data.resolution": 36})], message, capsys)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64)])
def test_training_shifts_as_the_pipeline_samples_in_its_own_number_of_steps(klein_run, height, width):
    """The step in the middle is at σ = 1/2, which it shifts to shift / (shift + 1)."""
    family = load_family(parse_config(klein_run))
    family.generate(family.load_denoiser(), ["x"], height, width, NUM_STEPS, 1.0, 0.0, draws())
    sigma = family.sampler.sigmas[NUM_STEPS // 2].item()
    assert family.shift(height // 8, width // 8) == pytest.approx(sigma / (1 - sigma), rel=1e-5)


def test_the_shift_of_real_sizes(klein_run):
    """512 and 1024 pixels: 32 and 64 patches. The authors' lines for 10 and for 200 steps, at 50 between them."""
    family = load_family(parse_config(klein_run))
    by_hand = [
        (8.73809524e-05 * tokens + 1.89833333) * 150 / 190 + (0.00016927 * tokens + 0.45666666) * 40 / 190
        for tokens in (32 * 32, 64 * 64)
    ]
    assert [math.log(family.shift(side, side)) for side in (32, 64)] == pytest.approx(by_hand)


@torch.no_grad()
@pytest.mark.parametrize(("is_distilled", "asked"), [(False, 2), (True, 1)])
def test_a_distilled_checkpoint_stays_one(klein_run, tmp_path, is_distilled, asked):
    """Which has no classifier-free guidance."""
    folder = tmp_path / "model"
    shutil.copytree(builtin_checkpoint("builtin:tiny-flux2-klein"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": is_distilled}))
    family = load_family(parse_config([*klein_run, *options({"model.pretrained_model_name_or_path": folder})]))
    denoiser, calls = family.load_denoiser(), []
    denoiser.register_forward_hook(lambda *call: calls.append(call))
    family.generate(denoiser, ["x"], 32, 32, 1, 4.0, 0.0, draws())
    assert len(calls) == asked
    family.save_pipeline(tmp_path / "saved", denoiser)
    assert DiffusionPipeline.from_pretrained(tmp_path / "saved").config.is_distilled == is_distilled


def test_the_template_of_chats_is_described(klein_run):
    """It decides what captions are encoded to, as a vocabulary does: caches of another are no good."""
    family = load_family(parse_config(klein_run))
    assert "tokenizer/chat_template.jinja" in family.describe_parts("tokenizer")
