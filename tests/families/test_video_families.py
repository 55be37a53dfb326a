"""Every family of videos against the real pipeline of its own, with tiny real parts: `builtin:tiny-…`."""

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from calls import Calls, generators
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from helpers import options, parse_config

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family, trained_models

NAMES = ("tiny-wan", "tiny-ltx")
SIZE = 9, 32, 32
PROMPTS = ["a red circle moving left", "a blue square"]


def video_config(name: str, **fields) -> TextToVideoConfig:
    """Of clips of 9 frames, 32 x 32 pixels; `fields` have __ for the dots of their names."""
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "model.max_sequence_length": 40}
    size = dict(zip(("data.num_frames", "data.height", "data.width"), SIZE, strict=True))
    own = {field.replace("__", "."): value for field, value in fields.items()}
    argv = options(model | size | {"data.dataset": "builtin:moving-shapes", "data.fps": 12} | own)
    return command_line.parse_config(TextToVideoConfig, argv)


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return load_family(video_config(name))


@pytest.fixture
def denoiser(family):
    torch.manual_seed(1)
    return fill_zeros(family.load_denoiser()).eval()


def first_latents(family, count: int) -> torch.Tensor:
    """What the pipeline begins with."""
    shape = family.encode_images(torch.zeros(1, 3, *SIZE)).shape[2:]
    return randn_tensor((count, *shape), generator=generators(count))


def sample(family, denoiser, prompts: list[str], steps: int, guidance_scale: float = 1.0) -> list[list[bytes]]:
    clips = family.generate(denoiser, prompts, *SIZE, steps, guidance_scale, 0.0, generators(len(prompts)))
    assert all(len(clip.frames) == SIZE[0] and clip.fps == 12 for clip in clips)
    return [[frame.tobytes() for frame in clip.frames] for clip in clips]


@torch.no_grad()
def test_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser):
    """Hooked on the pipeline's call: the same arguments and the same output of them, to the bit."""
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS, 2)
    (theirs, output), *_ = calls.pop()
    timestep = family.sampler.timesteps[0]
    family.predict(denoiser, first_latents(family, 2), timestep.expand(2), family.encode_prompts(PROMPTS))
    ((ours, ours_output),) = calls.pop()
    assert ours.keys() == theirs.keys() and torch.equal(ours_output, output)
    for key, value in theirs.items():
        is_same = ours[key].dtype == value.dtype and torch.equal(ours[key], value) if torch.is_tensor(value) else (
            ours[key] == value)  # fmt: skip
        assert is_same, key


@torch.no_grad()
def test_sampling_by_predict_is_the_pipelines(family, denoiser):
    """So the sign, the packing and the latents' normalisation are right: what the pipeline's VAE decodes, normalised,
    is what sampling with `predict` ends at."""
    decoded, vae = [], family.part("vae")
    vae.decode = lambda z, *args, **kwargs: decoded.append(z) or type(vae).decode(vae, z, *args, **kwargs)
    sample(family, denoiser, PROMPTS, 3)
    del vae.decode
    sampler, latents = copy.deepcopy(family.sampler), first_latents(family, 2)
    sampler._step_index, conditioning = None, family.encode_prompts(PROMPTS)
    if hasattr(sampler, "model_outputs"):  # UniPC remembers those of its last run
        sampler.set_timesteps(3)
    for timestep in sampler.timesteps:
        output = family.predict(denoiser, latents, timestep.expand(2), conditioning)
        latents = sampler.step(output, timestep, latents).prev_sample
    torch.testing.assert_close(latents, family.normalise(torch.cat(decoded)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_is_the_pipelines_own(family, denoiser):
    """Under guidance, the pipeline asks for the caption and for nothing."""
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS[:1], 1 if isinstance(family.sampler.timesteps, int) else 2, 3.0)
    of_both_steps = calls.pop()
    rows = [row for _, output in of_both_steps[: len(of_both_steps) // 2] for row in output]
    timestep, latents = family.sampler.timesteps[0], first_latents(family, 1)
    found = set()
    for caption in (PROMPTS[0], None):
        family.predict(denoiser, latents, timestep.expand(1), family.encode_prompts([caption]))
        ((_, output),) = calls.pop()
        nearest = min(range(len(rows)), key=lambda i: (rows[i] - output[0]).abs().max())
        torch.testing.assert_close(output[0], rows[nearest], rtol=1e-5, atol=1e-5)
        found.add(nearest)
    assert found == {0, 1} == set(range(len(rows)))


@torch.no_grad()
def test_captions_are_the_same_whatever_is_beside_them_and_from_caches(family, denoiser):
    """Caches cut off what the mask leaves out, and give it back as zeros as far as the longest caption goes."""
    together = family.encode_prompts([None, *PROMPTS, PROMPTS[0]])
    for row, caption in enumerate((None, *PROMPTS, PROMPTS[0])):
        for key, value in family.encode_prompts([caption]).items():
            assert torch.equal(together[key][row], value[0]), key
    mask = together["prompt_embeds_mask"]
    assert (mask.int().diff(dim=1) <= 0).all() and mask.shape[1] == 40, "a prefix"
    longest = mask.sum(1).max()
    cut = {key: value[:, :longest] for key, value in together.items()}
    latents, timesteps = first_latents(family, 4), torch.full((4,), 500)
    cached, direct = (family.predict(denoiser, latents, timesteps, given) for given in (cut, together))
    torch.testing.assert_close(cached, direct, rtol=1e-5, atol=1e-5)


def gradients(family, denoiser) -> dict[str, torch.Tensor]:
    latents, conditioning = first_latents(family, 2), family.encode_prompts(PROMPTS)
    denoiser.zero_grad()
    family.predict(denoiser, latents, torch.tensor([100.0, 700.0]), conditioning).square().mean().backward()
    return {name: parameter.grad for name, parameter in denoiser.named_parameters()}


def test_every_weight_has_a_gradient(family, denoiser):
    """Which DDP relies on; and checkpointing leaves it as it is."""
    plain = gradients(family, denoiser)
    assert [name for name, gradient in plain.items() if gradient is None] == []
    denoiser.enable_gradient_checkpointing()
    for weight, gradient in gradients(family, denoiser).items():
        torch.testing.assert_close(gradient, plain[weight], rtol=1e-4, atol=1e-7, msg=weight)


@torch.no_grad()
def test_adapters_are_loaded_by_plain_diffusers(name, family, tmp_path):
    config = video_config(name, model__lora__rank=4, model__lora__alpha=8)
    family = load_family(config)
    denoiser = trained_models(family, config)["denoiser"].eval()
    base = copy.deepcopy(family.pipeline(family.load_denoiser().eval()))
    before = sample(family, denoiser, PROMPTS, 2)
    for weight in (weight for weight in denoiser.parameters() if weight.requires_grad):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    ours = sample(family, denoiser, PROMPTS, 2)
    family.save_lora(tmp_path, denoiser)
    base.load_lora_weights(tmp_path)
    assert sample(family, base.transformer, PROMPTS, 2) == ours != before  # with alpha, which is not the rank


def test_what_is_saved_is_its_own_pipeline(family, denoiser, tmp_path):
    """Plain diffusers makes of it the clips that the family makes."""
    family.save_pipeline(tmp_path, denoiser)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is family.pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    sized = dict(zip(("num_frames", "height", "width"), SIZE, strict=True)) | {"num_inference_steps": 2}
    called = family.call_options(PROMPTS, 3.0) | sized | {"max_sequence_length": 40, "output_type": "pil"}
    theirs = pipeline(**called, generator=generators(2)).frames
    assert [[frame.tobytes() for frame in clip] for clip in theirs] == sample(family, denoiser, PROMPTS, 2, 3.0)


def test_sizes_that_the_model_cannot_take_are_refused(family):
    family.check_frames(1, "data.num_frames")
    family.check_frames(9, "data.num_frames")
    with pytest.raises(InputError, match=r"^data.num_frames: .* takes 4 n \+ 1 frames, such as 9 or 13, got 12$"):
        family.check_frames(12, "data.num_frames")
    with pytest.raises(InputError, match=r"^data.height: .* needs a multiple of (16|32), got 40 x 32$"):
        family.check_size(40, 32, "data.height")


@pytest.mark.parametrize("name", ["tiny-wan"], scope="module")
def test_it_is_of_videos_alone(name, short_run):
    with pytest.raises(InputError, match=r"it is of WanPipeline; known is StableDiffusionPipeline, "):
        load_family(parse_config([*short_run, "--model.pretrained_model_name_or_path", f"builtin:{name}"]))
    message = r"^scheduler.flow_base_resolution: is of images"
    with pytest.raises(InputError, match=message):
        video_config(name, scheduler__flow_base_resolution=512, scheduler__flow_shift=3)


# ── What is Wan's own ────────────────────────────────────────────────────────────────────────────────────────
def checkpoint(tmp_path, **model_index) -> str:
    """The tiny Wan with other fields of model_index.json."""
    folder = tmp_path / "model"
    shutil.copytree(builtin_checkpoint("builtin:tiny-wan"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | model_index))
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize(("fields", "expert"), [({"timesteps__min": 0.9}, 0), ({"timesteps__max": 0.9}, 1)])
def test_the_expert_of_the_noise_levels_is_trained(tmp_path, fields, expert):
    """And each is asked for its own in sampling."""
    source = checkpoint(tmp_path, boundary_ratio=0.9, transformer_2=["diffusers", "WanTransformer3DModel"])
    shutil.copytree(f"{source}/transformer", f"{source}/transformer_2")
    model = {"model__pretrained_model_name_or_path": source}
    with pytest.raises(InputError, match=r"^timesteps.min: .* has two experts, .*, got from 0.0 to 1.0$"):
        load_family(video_config("tiny-wan", **model))
    cached = {
        "data__cache_latents": True,
        "data__cache_text": True,
        "data__center_crop": True,
        "data__window": "middle",
    }
    family = load_family(video_config("tiny-wan", **model, **fields, **cached))
    parts = ("transformer", "transformer_2")
    assert family.denoiser_part == parts[expert] and family.other_experts == [parts[1 - expert]]
    denoiser = family.load_denoiser().eval()
    assert family.digests(denoiser).keys() == {*parts, "vae", "text_encoder"}
    assert parts[1 - expert] not in family._parts, "it is not loaded for training"
    asked = []
    denoiser.register_forward_hook(
        lambda _, args, given, out: asked.append(int(given["timestep"][0])), with_kwargs=True
    )
    sample(family, denoiser, PROMPTS[:1], 4)
    steps = family.sampler.timesteps.tolist()
    assert asked == [step for step in steps if (step >= 900) == (expert == 0)] and 0 < len(asked) < 4
    assert {*family.frozen_parts, parts[1 - expert]} == family._parts.keys()
    family.free_cached()
    assert [*family._parts] == ["tokenizer"]
    family.save_pipeline(tmp_path / "saved", denoiser)
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["boundary_ratio"] == 0.9 and all(index[part][1] == "WanTransformer3DModel" for part in parts)


@torch.no_grad()
def test_a_model_of_times_of_tokens_is_told_each(tmp_path):
    """Wan 2.2's for both text and images."""
    family = load_family(
        video_config("tiny-wan", model__pretrained_model_name_or_path=checkpoint(tmp_path, expand_timesteps=True))
    )
    denoiser = family.load_denoiser().eval()
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS, 2)
    (theirs, output), *_ = calls.pop()
    timestep = family.sampler.timesteps[0]
    family.predict(denoiser, first_latents(family, 2), timestep.expand(2), family.encode_prompts(PROMPTS))
    ((ours, ours_output),) = calls.pop()
    assert torch.equal(ours["timestep"].float(), theirs["timestep"]) and torch.equal(ours_output, output)


def test_the_vae_stays_in_float32():
    family = load_family(video_config("tiny-wan"))
    halved = dataclasses.replace(family, weight_dtype=torch.bfloat16, _parts={})
    assert halved.part("vae").dtype == torch.float32 and halved.part("text_encoder").dtype == torch.bfloat16


# ── What is LTX's own ────────────────────────────────────────────────────────────────────────────────────────
def test_the_shift_is_by_tokens_as_the_sampler_is_told():
    """Also of more frames; of real sizes it is what LTX-Video's pipeline makes of them."""
    family = load_family(video_config("tiny-ltx"))
    told, set_timesteps = [], family.sampler.set_timesteps
    family.sampler.set_timesteps = lambda *args, mu=None, sigmas=None, **given: told.append(mu) or set_timesteps(
        *args, mu=mu, sigmas=sigmas, **given)  # fmt: skip
    denoiser = family.load_denoiser().eval()
    for num_frames in (9, 17):
        family.generate(denoiser, PROMPTS[:1], num_frames, 32, 64, 2, 1.0, 0.0, generators(1))
        shift = family.shift(1 + num_frames // 4, 4, 8)
        assert shift == pytest.approx(math.exp(told[-1])) and len(set(told)) == len(told)


def test_the_latents_statistics_are_there_when_the_vae_is_dropped():
    """They are among its weights, and needed where latents come from the cache."""
    fields = {"data__cache_latents": True, "data__center_crop": True, "data__window": "middle"}
    family = load_family(video_config("tiny-ltx", **fields))
    latents = torch.randn(1, 8, 3, 4, 4)
    expected = load_family(video_config("tiny-ltx")).normalise(latents)
    assert torch.equal(family.normalise(latents), expected) and "vae" not in family._parts
    mean, std = torch.linspace(-0.5, 0.5, 8), torch.linspace(0.5, 2.0, 8)
    torch.testing.assert_close(expected, (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1))


def test_the_vae_computes_in_tiles(monkeypatch):
    """Where it can; of what is larger than one the latents are not quite the same."""
    plain, tiled = (
        load_family(video_config("tiny-wan", model__vae_tiling=is_tiled, model__vae_slicing=is_tiled))
        for is_tiled in (False, True)
    )
    vae = tiled.part("vae")
    assert tiled.tile_size == (256, 256) and vae.use_tiling and vae.use_slicing
    vae.enable_tiling(32, 32, 16, 16)
    pixel_values = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    whole, of_tiles = (family.encode_images(pixel_values) for family in (plain, tiled))
    assert whole.shape == of_tiles.shape and not torch.equal(whole, of_tiles)
    assert torch.equal(*(family.encode_images(pixel_values[..., :32]) for family in (plain, tiled)))
    monkeypatch.setattr(type(plain), "_on_meta", lambda self, name: torch.nn.Identity())
    for option in ("vae_tiling", "vae_slicing"):
        with pytest.raises(InputError, match=rf"^model.{option}: the VAE of .*, Identity, has none, got true$"):
            load_family(video_config("tiny-wan", **{f"model__{option}": True}))
