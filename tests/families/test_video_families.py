"""Every family of videos against the real pipeline of its own, with tiny real parts: `builtin:tiny-…`."""

import copy
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from calls import Calls, generators
from diffusers import (
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from helpers import data_of, metrics_without_times, options, parse_config, train_video
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from difftrain_utils.builtins.checkpoints import builtin_checkpoint
from difftrain_utils.builtins.tiny import cogvideox
from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.config import command_line
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate, scale_pixels
from difftrain_utils.errors import InputError
from difftrain_utils.evaluation.generate import generate
from difftrain_utils.evaluation.guidance import noise_levels
from difftrain_utils.families.cogvideox import CogVideoX
from difftrain_utils.families.denoiser import configure_denoiser
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.keyed_random import keyed_randn, seed_for
from difftrain_utils.objective.noise import correlate_frames
from difftrain_utils.objective.timesteps import sample_timesteps
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.optimization.sharding import units_of
from difftrain_utils.run.activations import count_activations
from difftrain_utils.run.flops import training_flops
from difftrain_utils.run.memory import Planner

NAMES = ("tiny-wan", "tiny-ltx", "tiny-cogvideox")
SIZE = 9, 32, 32
PROMPTS = ["a red circle moving left", "a blue square"]
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8, "optimizer__init_args__lr": 0.02}


def video_config(name: str, **fields) -> TextToVideoConfig:
    return command_line.parse_config(TextToVideoConfig, video_options(name, **fields))


def video_options(name: str, **fields) -> list[str]:
    """Of clips of 9 frames, 32 x 32 pixels; `fields` have __ for the dots of their names."""
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "model.max_sequence_length": 40}
    size = dict(zip(("data.num_frames", "data.height", "data.width"), SIZE, strict=True))
    own = {field.replace("__", "."): value for field, value in fields.items()}
    return options(model | size | {"data.dataset": "builtin:moving-shapes", "data.fps": 12} | own)


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return load_family(video_config(name))


@pytest.fixture
def denoiser(family):
    return denoiser_of(family)


def denoiser_of(family) -> torch.nn.Module:
    """Of which all inputs count."""
    torch.manual_seed(1)
    return fill_zeros(family.load_denoiser()).eval()


def first_latents(family, count: int) -> torch.Tensor:
    """What the pipeline begins with."""
    moments = family.encode_images(torch.zeros(1, 3, *SIZE))
    shape = family.sample_latents(moments, torch.zeros_like(moments[:, 0])).shape[1:]
    if isinstance(family, CogVideoX):  # whose latents are frames, then channels
        frames_first = (count, shape[1], shape[0], *shape[2:])
        return randn_tensor(frames_first, generator=generators(count)).transpose(1, 2)
    return randn_tensor((count, *shape), generator=generators(count))


def sample(family, denoiser, prompts: list[str], steps: int, guidance_scale: float = 1.0) -> list[list[bytes]]:
    clips = family.generate(denoiser, prompts, *SIZE, steps, guidance_scale, 0.0, generators(len(prompts)))
    assert all(len(clip.frames) == SIZE[0] and clip.fps == 12 for clip in clips)
    return [[frame.tobytes() for frame in clip.frames] for clip in clips]


@torch.no_grad()
def assert_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser) -> None:
    """Hooked on the pipeline's call: the same arguments and the same output of them, to the bit."""
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS, 2)
    (theirs, output), *_ = calls.pop()
    timestep = family.sampler.timesteps[0]
    family.predict(denoiser, first_latents(family, 2), timestep.expand(2), family.encode_prompts(PROMPTS))
    ((ours, ours_output),) = calls.pop()
    assert ours.keys() == theirs.keys() and torch.equal(ours_output, output)
    for key, value in theirs.items():
        for mine, its in zip(tree_leaves(ours[key]), tree_leaves(value), strict=True):
            is_tensor = torch.is_tensor(its)
            assert mine.dtype == its.dtype and torch.equal(mine, its) if is_tensor else mine == its, key


def test_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser):
    assert_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser)


@torch.no_grad()
def assert_sampling_by_predict_is_the_pipelines(family, denoiser) -> None:
    """So the sign, the packing and the latents' normalisation are right: what the pipeline's VAE decodes, normalised,
    is what sampling with `predict` ends at."""
    decoded, vae = [], family.part("vae")
    vae.decode = lambda z, *args, **kwargs: decoded.append(z) or type(vae).decode(vae, z, *args, **kwargs)
    sample(family, denoiser, PROMPTS, 3)
    del vae.decode
    sampler, latents = copy.deepcopy(family.sampler), first_latents(family, 2)
    for field, value in {"_step_index": None, "lower_order_nums": 0, "last_sample": None}.items():  # before its steps
        setattr(sampler, field, value)
    conditioning = family.encode_prompts(PROMPTS)
    for timestep in sampler.timesteps:
        output = family.predict(denoiser, latents, timestep.expand(2), conditioning)
        latents = sampler.step(output, timestep, latents).prev_sample
    made = family.normalise(torch.cat(decoded))  # of frames that were added, nothing
    torch.testing.assert_close(latents[:, :, -made.shape[2] :], made, rtol=1e-5, atol=1e-5)


def test_sampling_by_predict_is_the_pipelines(family, denoiser):
    assert_sampling_by_predict_is_the_pipelines(family, denoiser)


@pytest.mark.parametrize(("path", "prediction_type"), [("cosine", "v_prediction"), ("linear", "sample")])
def test_another_path_is_sampled_by_the_pipeline_or_refused(name, path, prediction_type):
    fields = {"scheduler__path": path, "model__prediction_type": prediction_type}
    fields |= {"scheduler__flow_shift": 2.0} if path == "linear" else {}
    if name == "tiny-ltx" and path == "cosine":
        with pytest.raises(InputError, match=r"^scheduler.path: must be linear for a pipeline that says where"):
            load_family(video_config(name, **fields))
        return
    family = load_family(video_config(name, **fields))
    assert (family.schedule.path, family.schedule.prediction_type) == (path, prediction_type)
    assert_sampling_by_predict_is_the_pipelines(family, denoiser_of(family))


@torch.no_grad()
def test_sampling_begins_with_noise_whose_frames_are_correlated(name, denoiser):
    """As those of training's are."""
    family = load_family(video_config(name, noise__frame_correlation="mixed"))
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS, 2)
    (theirs, _), *_ = calls.pop()
    channels, frames, *sides = first_latents(family, 2).shape[1:]
    noise = randn_tensor((2, channels, frames + 1, *sides), generator=generators(2))
    timesteps = family.sampler.timesteps[0].expand(2)
    family.predict(denoiser, correlate_frames(family.noise, noise), timesteps, family.encode_prompts(PROMPTS))
    ((ours, _),) = calls.pop()
    assert torch.equal(ours["hidden_states"], theirs["hidden_states"])


@torch.no_grad()
def test_nothing_is_the_pipelines_own(family, denoiser):
    """Under guidance, the pipeline asks for the caption and for nothing."""
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS[:1], 2, 3.0)
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
    if "prompt_embeds_mask" not in together:  # padding counts
        assert together["prompt_embeds"].shape[1] == 40
        return
    mask = together["prompt_embeds_mask"]
    assert (mask.int().diff(dim=1) <= 0).all() and mask.shape[1] == 40, "a prefix"
    longest = mask.sum(1).max()
    cut = {key: value[:, :longest] for key, value in together.items()}
    latents, timesteps = first_latents(family, 4), torch.full((4,), 500)
    cached, direct = (family.predict(denoiser, latents, timesteps, given) for given in (cut, together))
    torch.testing.assert_close(cached, direct, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "length"), [("tiny-wan", 512), ("tiny-ltx", 128), ("tiny-cogvideox", 226)])
def test_prompts_are_as_long_as_the_pipeline_has_them_by_default(name, length):
    """How long they are moves the velocity, of Wan's zeros, too."""
    family, short = (load_family(video_config(name, model__max_sequence_length=n)) for n in (None, 16))
    denoiser = denoiser_of(family)
    calls = Calls(denoiser)
    sample(family, denoiser, PROMPTS[:1], 2)
    (theirs, output), *_ = calls.pop()
    timestep = family.sampler.timesteps[0]
    for told, is_same in ((family, True), (short, False)):
        told.predict(denoiser, first_latents(family, 1), timestep.expand(1), told.encode_prompts(PROMPTS[:1]))
        ((ours, found),) = calls.pop()
        assert ours["encoder_hidden_states"].shape[1] == (length if is_same else 16)
        assert torch.equal(found, output) == is_same
    assert theirs["encoder_hidden_states"].shape[1] == length


@torch.no_grad()
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_frozen_parts_in_half_precision_are_those_of_diffusers(name, family, precision, dtype):
    """But for Wan's VAE; and a run computes with them nearly what it computes without."""
    theirs = DiffusionPipeline.from_pretrained(family.source, torch_dtype=dtype, transformer=None)
    halved = dataclasses.replace(family, _parts={})
    halved.move_frozen_parts(SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision), TrainConfig())
    for part, module in halved.frozen_modules().items():
        plain = getattr(theirs, part).state_dict()
        assert plain.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor.to(plain[key].dtype), plain[key]), f"{part}.{key}"
    if precision == "bf16":
        denoiser, pixels, outputs = denoiser_of(family), torch.rand(2, 3, *SIZE) * 2 - 1, []
        for each in (family, halved):
            latents, conditioning = each.encode_images(pixels)[:, 0], each.encode_prompts(PROMPTS)
            latents = each.sample_latents(torch.stack([latents, torch.zeros_like(latents)], 1), torch.zeros(()))
            with torch.autocast("cpu", dtype, enabled=each is halved):
                outputs.append(each.predict(denoiser, latents, torch.tensor([100, 700]), conditioning))
        full, half = outputs
        assert half.dtype == torch.float32 and 0 < (half - full).norm() < 0.05 * full.norm()


def test_encoders_whose_weights_stay_on_the_disk(family):
    offloaded = dataclasses.replace(family, offload_text_encoders=True, _parts={})
    wanted, found = (made.encode_prompts([*PROMPTS, None]) for made in (family, offloaded))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and found.keys() == wanted.keys()
    assert all(weight.is_meta for weight in offloaded.part("text_encoder").parameters())


def test_flops_and_activations_can_be_counted(name, family, denoiser):
    """Without values, as many as with them."""
    config = video_config(name, train__batch_size=2)
    optimizer = build_optimizer(config.optimizer, {"denoiser": denoiser})
    planner = Planner(Accelerator(cpu=True), family, {"denoiser": denoiser}, optimizer, Data([], []), config)
    inputs = *a_batch(family), family.encode_prompts(PROMPTS)
    kept = count_activations(denoiser, family.predict, *inputs).kept
    assert planner.held(config)["activations"] == pytest.approx(kept, rel=0.02)
    flops = training_flops(family.denoiser_on_meta(), family.predict, *inputs)
    assert planner.flops(config)["forward and backward pass"] == flops > 1e7


@torch.no_grad()
def test_guidance_at_some_noise_levels_and_by_a_weaker_model(name, family, denoiser):
    def draw(weaker=None, **fields) -> np.ndarray:
        config = dataclasses.replace(video_config(name).evaluation, num_inference_steps=2, **fields)
        (clip,) = generate(family, denoiser, config, SIZE, PROMPTS[:1], [0], weaker)
        return np.stack([np.asarray(frame, np.int32) for frame in clip.frames])

    guided, unguided = draw(guidance_scale=4.0), draw(guidance_scale=1.0)
    between = sum(noise_levels(family.schedule, family.sampler)[:2]) / 2
    nowhere = draw(guidance_scale=4.0, guidance_interval=[between, between + 1e-6])
    assert np.abs(nowhere - unguided).max() <= 1 < np.abs(guided - unguided).max()  # of 255: two in a batch round
    assert np.array_equal(draw(denoiser, guidance_scale=4.0), unguided)


def a_batch(family) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and timesteps."""
    return first_latents(family, 2), torch.tensor([100.0, 700.0] if family.schedule.has_continuous_time else [100, 700])


def gradients(family, denoiser) -> dict[str, torch.Tensor]:
    denoiser.zero_grad()
    family.predict(denoiser, *a_batch(family), family.encode_prompts(PROMPTS)).square().mean().backward()
    return {name: parameter.grad for name, parameter in denoiser.named_parameters()}


def test_every_weight_has_a_gradient(family, denoiser):
    """Which DDP relies on; and checkpointing leaves it as it is."""
    plain = gradients(family, denoiser)
    assert [name for name, gradient in plain.items() if gradient is None] == []
    denoiser.enable_gradient_checkpointing()
    for weight, gradient in gradients(family, denoiser).items():
        torch.testing.assert_close(gradient, plain[weight], rtol=1e-4, atol=1e-7, msg=weight)


@torch.no_grad()
def test_adapters_are_loaded_by_plain_diffusers(name, tmp_path):
    assert_adapters_are_loaded_by_plain_diffusers(video_config(name, **LORA), tmp_path)


@torch.no_grad()
def assert_adapters_are_loaded_by_plain_diffusers(config, folder, run=None) -> None:
    """With alpha, which is not the rank: those of a run, or drawn ones."""
    family = load_family(config)
    denoiser, part = trained_models(family, config)["denoiser"].eval(), family.denoiser_part
    base = copy.deepcopy(family.pipeline(family.load_denoiser().eval()))
    inputs = *a_batch(family), family.encode_prompts(PROMPTS)
    before = family.predict(denoiser, *inputs)
    if run is None:
        for weight in (weight for weight in denoiser.parameters() if weight.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        family.save_lora(folder, denoiser)
    else:
        found = denoiser.load_state_dict(load_file(run / "checkpoint-2/denoiser.safetensors"), strict=False)
        assert not found.unexpected_keys
    base.load_lora_weights(folder, **({"load_into_transformer_2": True} if part == "transformer_2" else {}))
    ours = family.predict(denoiser, *inputs)
    assert torch.equal(family.predict(getattr(base, part), *inputs), ours) and not torch.equal(ours, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "experts"], scope="module")
def test_the_adapters_of_a_run_are_loaded_by_plain_diffusers(name, tmp_path):
    """Also of a quantised base, for the base as it was, in half precision and with grids."""
    fields = LORA | {"train__max_steps": 2, "train__batch_size": 2, "train__log_every": 1, "ema__enabled": False}
    if name == "experts":  # the one of low noise
        name, source = "tiny-wan", two_experts(tmp_path)
        fields |= {"model__pretrained_model_name_or_path": source, "timesteps__max": 0.9}
    run = train_video(video_options(name, **fields, train__output_dir=tmp_path / "run"))
    assert_adapters_are_loaded_by_plain_diffusers(video_config(name, **fields), run / "lora", run)
    fields |= {"model__lora__quantization": "nf4", "train__precision": "bf16", "train__eval_every": 2}
    fields |= {"evaluation__prompts": PROMPTS, "evaluation__num_inference_steps": 2}
    quantized = train_video(video_options(name, **fields, train__output_dir=tmp_path / "quantized"))
    losses = [metrics_without_times(run)[0]["loss"] for run in (run, quantized)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    config = video_config(name, **fields | {"model__lora__quantization": None, "train__precision": "fp32"})
    assert_adapters_are_loaded_by_plain_diffusers(config, quantized / "lora", quantized)


@pytest.mark.slow
def test_the_first_loss_and_gradient_are_the_textbooks(name, tmp_path):
    """By hand from the keyed draws, the VAE's posterior and the objective's formula, the whole batch at once."""
    argv = video_options(name, train__max_steps=1, train__batch_size=2, train__log_every=1, train__output_dir=tmp_path)
    config = command_line.parse_config(TextToVideoConfig, argv)
    logged, family = metrics_without_times(train_video(argv))[0], load_family(config)
    samples = Samples(data_of(map_rows(config.data)), config.data, 0, 2)
    batch = scale_pixels(collate([samples[k] for k in range(2)]))
    posterior = family.part("vae").encode(batch["pixel_values"]).latent_dist
    latents = family.normalise(
        posterior.mean + posterior.std * keyed_randn(0, "vae_noise", range(2), posterior.mean.shape[1:])
    )
    noise = keyed_randn(0, "noise", range(2), latents.shape[1:])
    timesteps = sample_timesteps(config.timesteps, family.schedule, 0, range(2), 2, family.shift(*latents.shape[2:]))
    if name == "tiny-cogvideox":
        noisy = family.sampler.add_noise(latents, noise, timesteps)
        target = family.sampler.get_velocity(latents, noise, timesteps)
    else:
        sigmas = (timesteps / 1000).view(-1, 1, 1, 1, 1)
        noisy, target = (1 - sigmas) * latents + sigmas * noise, noise - latents
    denoiser = family.load_denoiser().train()
    torch.manual_seed(seed_for(0, "model", 0))
    output = family.predict(denoiser, noisy, timesteps, family.encode_prompts(batch["captions"]))
    loss = (output - target).square().mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in denoiser.parameters() if p.grad is not None]).norm()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(name, family, denoiser):
    plain = gradients(family, denoiser)
    if name == "tiny-cogvideox":  # of which diffusers names no repeated blocks
        with pytest.raises(InputError, match=r"^train.compile: regional is not for this model: "):
            configure_denoiser(TrainConfig(compile="regional"), denoiser)
        return
    configure_denoiser(TrainConfig(compile="regional"), denoiser)
    for weight, gradient in gradients(family, denoiser).items():
        torch.testing.assert_close(gradient, plain[weight], rtol=1e-3, atol=1e-6, msg=weight)


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
    with pytest.raises(
        InputError, match=r"^data.num_frames: builtin:tiny-\S+ takes [48] n \+ 1 frames, such as 9 or 1[37], got 12$"
    ):
        family.check_frames(12, "data.num_frames")
    with pytest.raises(InputError, match=r"^data.height: builtin:tiny-\S+ needs a multiple of (16|32), got 40 x 32$"):
        family.check_size(40, 32, "data.height")


@pytest.mark.parametrize("name", ["tiny-wan"], scope="module")
def test_it_is_of_videos_alone(name, short_run):
    with pytest.raises(InputError, match=r"it is of WanPipeline: train it with train_text_to_video.py$"):
        load_family(parse_config([*short_run, "--model.pretrained_model_name_or_path", f"builtin:{name}"]))
    with pytest.raises(InputError, match=r"it is of StableDiffusionPipeline: train it with train_text_to_image.py$"):
        load_family(video_config("tiny-stable-diffusion"))
    with pytest.raises(InputError, match=r"^data.random_flip: mirrors what moves left, and builtin:moving-shapes "):
        video_config(name, data__random_flip=True)
    message = r"^scheduler.flow_base_resolution: is of images"
    with pytest.raises(InputError, match=message):
        video_config(name, scheduler__flow_base_resolution=512)


# ── What is Wan's own ────────────────────────────────────────────────────────────────────────────────────────
def checkpoint(tmp_path, **model_index) -> str:
    """The tiny Wan with other fields of model_index.json."""
    folder = tmp_path / "model"
    shutil.copytree(builtin_checkpoint("builtin:tiny-wan"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | model_index))
    return str(folder)


def two_experts(tmp_path) -> str:
    """The tiny Wan as 2.2, with two equal experts."""
    source = checkpoint(tmp_path, boundary_ratio=0.9, transformer_2=["diffusers", "WanTransformer3DModel"])
    shutil.copytree(f"{source}/transformer", f"{source}/transformer_2")
    return source


@torch.no_grad()
@pytest.mark.parametrize(("fields", "expert"), [({"timesteps__min": 0.9}, 0), ({"timesteps__max": 0.9}, 1)])
def test_the_expert_of_the_noise_levels_is_trained(tmp_path, fields, expert):
    """And each is asked for its own in sampling."""
    source = two_experts(tmp_path)
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
    assert family.noise_range == ((0.9, 1.0), (0.0, 0.9))[expert]
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
@pytest.mark.parametrize("shifts", [None, {96: 2.0, 160: 4.0}], ids=["its own", "flow_shift_by_tokens"])
def test_the_shift_is_by_tokens_as_the_sampler_is_told(shifts):
    """Also of more frames; of real sizes it is what LTX-Video's pipeline makes of them."""
    by_tokens = {"scheduler__flow_shift_by_tokens": [[*pair] for pair in shifts.items()]} if shifts else {}
    family = load_family(video_config("tiny-ltx", **by_tokens))
    family.sampler.register_to_config(shift_terminal=None)  # which moves sigmas that are shifted
    told, set_timesteps = [], family.sampler.set_timesteps
    family.sampler.set_timesteps = lambda *args, mu=None, sigmas=None, **given: told.append(mu) or set_timesteps(
        *args, mu=mu, sigmas=sigmas, **given)  # fmt: skip
    denoiser = family.load_denoiser().eval()
    for num_frames, num_tokens in ((9, 96), (17, 160)):
        family.generate(denoiser, PROMPTS[:1], num_frames, 32, 64, 2, 1.0, 0.0, generators(1))
        shift = family.shift(1 + num_frames // 4, 4, 8)
        assert shift == pytest.approx(math.exp(told[-1])) and len(set(told)) == len(told)
        assert shifts is None or shift == pytest.approx(shifts[num_tokens])
        sigmas = [1.0, shift * 0.5 / (1 + (shift - 1) * 0.5), 0.0]
        assert family.sampler.sigmas.tolist() == pytest.approx(sigmas)


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


# ── What is CogVideoX's own ──────────────────────────────────────────────────────────────────────────────────
KINDS = {
    "2B": {"use_rotary_positional_embeddings": False, "max_text_seq_length": 40},
    "1.5": {"patch_size_t": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_kinds_of_cogvideox(tmp_path, kind):
    """Places that are added, and tokens of two frames of latents."""
    torch.manual_seed(0)
    cogvideox.make(**KINDS[kind]).save_pretrained(tmp_path)
    model = {"model__pretrained_model_name_or_path": tmp_path}
    family = load_family(video_config("tiny-cogvideox", **model))
    denoiser = denoiser_of(family)
    assert_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser)
    assert_sampling_by_predict_is_the_pipelines(family, denoiser)
    latents = first_latents(family, 1)
    moments = torch.stack([latents[:, :, -3:], torch.zeros_like(latents[:, :, -3:])], 1)
    sampled = family.sample_latents(moments, torch.zeros(()))
    if kind == "2B":
        with pytest.raises(InputError, match=r"^model.max_sequence_length: must be 40 for this \w+, got 24$"):
            load_family(video_config("tiny-cogvideox", **model, model__max_sequence_length=24))
    else:
        assert sampled.shape[2] == 4 and torch.equal(sampled[:, :, 0], sampled[:, :, 1])
        with pytest.raises(InputError, match=r"^data.width: .* takes at most 32 x 32, got 32 x 48$"):
            family.check_size(32, 48, "data.width")


def test_a_transformer_that_is_told_of_an_image_is_refused(tmp_path):
    cogvideox.make(in_channels=8, ofs_embed_dim=96).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"transformer: it is told of an image, of which a CogVideoXPipeline tells"):
        load_family(video_config("tiny-cogvideox", model__pretrained_model_name_or_path=tmp_path))


# ── The real models ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("model", "config", "billions"),
    [
        (WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 1.42),  # 2.1 1.3B
        (WanTransformer3DModel, {}, 14.29),  # 2.1 14B, and each expert of 2.2 A14B
        (LTXVideoTransformer3DModel, {}, 1.92),
        (CogVideoXTransformer3DModel, {}, 1.69),  # 2B
        (
            CogVideoXTransformer3DModel,
            {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
            5.57,
        ),
    ],
)
def test_the_real_models_are_shared_out_in_small_parts(model, config, billions):
    with torch.device("meta"):
        model = model(**config)
    sizes = [sum(parameter.numel() for parameter in unit) for unit in units_of(model)]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(sizes) / 1e9 == pytest.approx(billions, abs=0.01) and max(sizes) < 0.1 * sum(sizes)
