"""What is Flux.1's own: guidance in training and in sampling, and a shift by the size."""

import inspect
import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline
from helpers import assert_one_line, options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.keyed_random import torch_generator_for

FIELDS = {"model.pretrained_model_name_or_path": "builtin:tiny-flux", "model.max_sequence_length": 24}


@pytest.fixture
def flux_run(short_run) -> list[str]:
    return [*short_run, *options(FIELDS)]


@pytest.fixture
def schnell_run(flux_run, tmp_path) -> list[str]:
    """A checkpoint without an embedding of guidance."""
    folder = tmp_path / "schnell"
    shutil.copytree(builtin_checkpoint("builtin:tiny-flux"), folder)
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_embeds": False}))
    return [*flux_run, *options({"model.pretrained_model_name_or_path": folder, "model.train_from_scratch": True})]


@torch.no_grad()
@pytest.mark.parametrize(("fields", "guidance"), [({}, 1.0), ({"model.guidance": 3.5}, 3.5)])
def test_a_distilled_denoiser_is_told_the_trainings_guidance_and_the_samplings(flux_run, fields, guidance):
    family = load_family(parse_config([*flux_run, *options(fields)]))
    denoiser, captions, told = family.load_denoiser(), ["a red circle", "x"], []
    denoiser.register_forward_pre_hook(lambda module, args, given: told.append(given["guidance"]), with_kwargs=True)
    family.predict(denoiser, torch.zeros(2, 4, 8, 8), torch.tensor([3.0, 900.0]), family.encode_prompts(captions))
    draws = [torch_generator_for(0, "evaluation", k) for k in range(2)]
    family.generate(denoiser, captions, 32, 32, 1, 4.5, 0.0, draws)
    assert [values.tolist() for values in told] == [[guidance] * 2, [4.5] * 2]


@torch.no_grad()
@pytest.mark.parametrize(("guidance_scale", "asked"), [(3.0, 2), (1.0, 1)])
def test_without_the_embedding_guidance_is_classifier_free(schnell_run, guidance_scale, asked):
    """Of the caption and of the empty one, by the pipeline's `true_cfg_scale`."""
    family = load_family(parse_config(schnell_run))
    torch.manual_seed(1)
    denoiser, outputs = fill_zeros(family.load_denoiser()).eval(), []
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    family.generate(denoiser, ["x"], 32, 32, 1, guidance_scale, 0.0, [torch_generator_for(0, "evaluation", 0)])
    theirs = list(outputs)
    assert len(theirs) == asked
    latents = torch.randn(1, 4, 8, 8, generator=torch_generator_for(0, "evaluation", 0))
    for caption, output in zip(["x", None], theirs, strict=False):
        family.predict(denoiser, latents, family.sampler.timesteps[:1], family.encode_prompts([caption]))
        torch.testing.assert_close(outputs[-1], output)


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-flux2-klein", "tiny-chroma"])
def test_a_sampler_that_the_pipeline_cannot_ask_is_refused(flux_run, name):
    """Which else would be seen at the first images."""
    fields = {"scheduler.sampler": "DPMSolverMultistepScheduler", "scheduler.flow_shift": 3.0}
    fields |= {"model.pretrained_model_name_or_path": f"builtin:{name}"}
    with pytest.raises(InputError, match=r"^scheduler.sampler: .* which DPMSolverMultistepScheduler does not take"):
        load_family(parse_config([*flux_run, *options(fields)]))


def test_another_sampler_of_flow_matching_is_not(flux_run):
    fields = {"scheduler.sampler": "UniPCMultistepScheduler", "scheduler.flow_shift": 3.0}
    family = load_family(parse_config([*flux_run, *options(fields)]))
    assert family.generate(family.load_denoiser(), ["x"], 32, 32, 2, 1.0, 0.0, [torch_generator_for(0, "x", 0)])


def test_what_it_cannot_do_is_refused(flux_run, schnell_run, capsys):
    message = "model.max_sequence_length: must be from 1 to 512 for this FluxPipeline, got 513"
    assert_one_line([*flux_run, *options({"model.max_sequence_length": 513})], message, capsys)
    message = "model.guidance: the transformer of .*schnell has no embedding of guidance"
    assert_one_line([*schnell_run, *options({"model.guidance": 2.0})], message, capsys)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64)])
def test_training_shifts_as_the_pipeline_samples(flux_run, height, width):
    """The second of two steps is at σ = 1/2, which it shifts to shift / (shift + 1)."""
    family = load_family(parse_config(flux_run))
    draws = [torch_generator_for(0, "evaluation", 0)]
    family.generate(family.load_denoiser(), ["x"], height, width, 2, 1.0, 0.0, draws)
    sigma = family.sampler.sigmas[1].item()
    assert family.shift(height // 4, width // 4) == pytest.approx(sigma / (1 - sigma), rel=1e-5)


def test_the_shift_of_real_sizes_is_flux_1_devs(flux_run):
    """512, 1024 and 1536 pixels, as its VAE makes 64, 128 and 192 of them."""
    family = load_family(parse_config(flux_run))
    shifts = [family.shift(side, side) for side in (64, 128, 192)]
    assert shifts == pytest.approx([1.88, 3.16, 7.51], abs=0.005)


def test_512_tokens_are_the_default(flux_run):
    family = load_family(parse_config([*flux_run, *options({"model.max_sequence_length": None})]))
    assert family.encode_prompts(["x"])["prompt_embeds"].shape[1] == 512
    assert inspect.signature(FluxPipeline.__call__).parameters["max_sequence_length"].default == 512
