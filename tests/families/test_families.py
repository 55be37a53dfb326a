"""Every family against the real pipeline of its own, with tiny real parts: `builtin:tiny-…`."""

import copy
import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from calls import Calls, assert_same, generators
from diffusers import ChromaPipeline, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from helpers import CACHES, DREAM, data_of, metrics_without_times, options, parse_config, pipeline_bytes, train

from difftrain_utils.builtins.tiny.parts import fill_zeros
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.data.rows import map_rows
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.errors import InputError
from difftrain_utils.families.load import load_family
from difftrain_utils.families.prx_pixel import PRXPixel
from difftrain_utils.keyed_random import keyed_randn, seed_for
from difftrain_utils.media.image import to_pixel_values
from difftrain_utils.objective.few_step import probing
from difftrain_utils.objective.timesteps import sample_timesteps
from difftrain_utils.run.flops import training_flops

SHORT = {"model.max_sequence_length": 24}
CHAT = {"model.max_sequence_length": 72}  # the template of a chat alone takes 38
FAMILIES = {
    "tiny-stable-diffusion": {},
    "tiny-sdxl": {},
    "tiny-sd3": SHORT,
    "tiny-zimage": {"model.max_sequence_length": 40},
    "tiny-flux2-klein": CHAT,
    "tiny-flux": SHORT,
    "tiny-qwen-image": {"model.max_sequence_length": 32},
    "tiny-dit": {},
    "tiny-ddpm": {},
    "tiny-pixart-sigma": SHORT,
    "tiny-sana": SHORT,
    "tiny-lumina2": {"model.max_sequence_length": 80},
    "tiny-chroma": SHORT,
    "tiny-pixel": {},
}
"""Each built-in checkpoint, and the fields of its runs."""
REFUSED = {"tiny-chroma": ["train.gradient_checkpointing"]}
"""Fields that a family refuses, which a test of its own sees."""
MASKED = [
    *("tiny-zimage", "tiny-qwen-image", "tiny-lumina2", "tiny-pixart-sigma", "tiny-sana", "tiny-chroma", "tiny-pixel")
]
"""Those whose denoiser is told which tokens count."""
GIVES_SIGMAS = ["tiny-zimage", "tiny-qwen-image", "tiny-lumina2", "tiny-flux", "tiny-flux2-klein", "tiny-chroma"]
"""Those whose pipeline tells its sampler where to sample, and a shift."""
PIXELS = ["tiny-ddpm", "tiny-pixel"]
"""Those that train on pixels, where there is no encoding of images to cache."""
CAPTIONS = ["a red circle", "a blue square of another kind", "a third one"]
CLASSES = ["a red circle", "a blue square", "a cyan triangle"]


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def captions(name) -> list[str]:
    return CLASSES if name == "tiny-dit" else CAPTIONS


@pytest.fixture
def family_run(name, short_run) -> list[str]:
    """Options of a run of seconds with the family's built-in checkpoint."""
    model = {"model.pretrained_model_name_or_path": f"builtin:{name}", "train.max_steps": 4, "train.batch_size": 2}
    evaluation = {"evaluation.num_inference_steps": 2, "evaluation.guidance_scale": 3.0}
    return [*short_run, *options(model | evaluation | FAMILIES[name])]


@pytest.fixture
def family(family_run):
    return load_family(parse_config(family_run))


@pytest.fixture
def masks_are_bool(monkeypatch):
    """Chroma's pipeline makes numbers of its mask, which attention adds where it should mask (diffusers 0.42): the
    pipeline as it is meant to be."""
    prepare = ChromaPipeline._prepare_attention_mask
    monkeypatch.setattr(
        ChromaPipeline, "_prepare_attention_mask", lambda *args, **kwargs: as_bool(prepare(*args, **kwargs))
    )


def as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.bool()


@pytest.fixture
def denoiser(family):
    """Weights that begin at zero are drawn, so that all of its inputs count."""
    torch.manual_seed(1)
    return fill_zeros(family.load_denoiser()).eval()


def call_pipeline(family, denoiser, captions: list[str], guidance_scale: float, steps: int) -> tuple:
    """The images of the family's own pipeline, and what its VAE decodes (None in pixel space)."""
    decoded, vae = [], family.part("vae") if family.image_part else None
    if vae is not None:
        vae.decode = lambda z, *args, **kwargs: decoded.append(z) or type(vae).decode(vae, z, *args, **kwargs)
    images = family.generate(denoiser, captions, 32, 32, steps, guidance_scale, 0.0, generators(len(captions)))
    if vae is not None:
        del vae.decode
    return images, torch.cat(decoded) if decoded else None


def first_latents(family, draws: list[torch.Generator]) -> torch.Tensor:
    """What the pipeline begins with, drawn from the generators."""
    shape = family.sample_latents(family.encode_images(torch.zeros(1, 3, 32, 32)), torch.zeros(())).shape[1:]
    noise = randn_tensor((len(draws), *shape), generator=draws)
    return noise * getattr(family.sampler, "init_noise_sigma", 1.0) if family.has_init_noise_sigma else noise


def scaled(sampler, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return sampler.scale_model_input(latents, timestep) if hasattr(sampler, "scale_model_input") else latents


def as_its_sampler_takes_it(family, output, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """PRXPixel's pipeline makes velocities of clean images, smaller ones than they are where σ is below 0.05."""
    if not isinstance(family, PRXPixel):
        return output
    return (latents - output) / (timestep / 1000).clamp(min=0.05)


@pytest.mark.usefixtures("masks_are_bool")
@torch.no_grad()
def test_the_denoiser_is_asked_as_its_pipeline_asks_it(family, denoiser, captions):
    """Hooked on the pipeline's call: the same arguments, and the same output of them."""
    calls = Calls(denoiser)
    call_pipeline(family, denoiser, captions[:2], 1.0, 2)
    (theirs, output), *_ = calls.pop()
    timestep, sampler = family.sampler.timesteps[0], copy.deepcopy(family.sampler)
    sampler._step_index = None
    latents = scaled(sampler, first_latents(family, generators(2)), timestep)
    family.predict(denoiser, latents, timestep.expand(2), family.encode_prompts(captions[:2]))
    ((ours, ours_output),) = calls.pop()
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs, "arguments")
    assert_same(ours_output, output)


@torch.no_grad()
def assert_sampling_by_predict_is_the_pipelines(family, denoiser, captions) -> None:
    """So the sign, the packing and the latents' normalisation are right: what the pipeline's VAE decodes, normalised,
    is what sampling with `predict` ends at."""
    images, decoded = call_pipeline(family, denoiser, captions[:2], 1.0, 3)
    sampler, draws, conditioning = family.sampler, generators(2), family.encode_prompts(captions[:2])
    for field, value in {"_step_index": None, "lower_order_nums": 0, "last_sample": None}.items():  # before its steps
        setattr(sampler, field, value)
    latents = first_latents(family, draws)
    for timestep in sampler.timesteps:
        output = family.predict(denoiser, scaled(sampler, latents, timestep), timestep.expand(2), conditioning)
        output = as_its_sampler_takes_it(family, output, latents, timestep)
        options = {"generator": draws} if "generator" in inspect.signature(sampler.step).parameters else {}
        latents = sampler.step(output, timestep, latents, **options).prev_sample
    if decoded is None:
        made = torch.stack([to_pixel_values(image) for image in images])
        largest = family.normalise(torch.ones(()))
        torch.testing.assert_close(latents.clamp(-largest, largest), family.normalise(made), rtol=0, atol=1 / 127)
    else:
        decoded = decoded[:, :, 0] if decoded.ndim == 5 else decoded
        torch.testing.assert_close(latents, family.normalise(decoded), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("masks_are_bool")
def test_sampling_by_predict_is_the_pipelines(family, denoiser, captions):
    assert_sampling_by_predict_is_the_pipelines(family, denoiser, captions)


@pytest.mark.usefixtures("masks_are_bool")
@pytest.mark.parametrize(("path", "prediction_type"), [("cosine", "v_prediction"), ("linear", "sample")])
def test_another_path_is_sampled_by_the_pipeline_or_refused(name, family_run, captions, path, prediction_type):
    fields = {"scheduler.path": path, "model.prediction_type": prediction_type}
    fields |= {"scheduler.flow_shift": 2.0} if path == "linear" else {}
    config, cannot = parse_config([*family_run, *options(fields)]), {"cosine": [*GIVES_SIGMAS, "tiny-pixel"]}
    if name in cannot.get(path, ["tiny-zimage"]):
        with pytest.raises(InputError, match=r"scheduler.(path: must be linear|sampler: a ZImagePipeline)|be sample"):
            load_family(config)
        return
    family = load_family(config)
    assert (family.schedule.path, family.schedule.prediction_type) == (path, prediction_type)
    torch.manual_seed(1)
    assert_sampling_by_predict_is_the_pipelines(family, fill_zeros(family.load_denoiser()).eval(), captions)


@pytest.mark.usefixtures("masks_are_bool")
@torch.no_grad()
def test_nothing_is_the_pipelines_own(family, denoiser, captions):
    """Under guidance, the pipeline asks for the caption and for nothing: both rows of what the denoiser puts out. It
    asks a denoiser that is told the guidance for the caption alone."""
    calls = Calls(denoiser)
    call_pipeline(family, denoiser, captions[:1], 3.0, 2)
    of_both_steps = calls.pop()
    rows = [row for _, output in of_both_steps[: len(of_both_steps) // 2] for row in output]
    timestep, sampler = family.sampler.timesteps[0], copy.deepcopy(family.sampler)
    sampler._step_index = None
    latents = scaled(sampler, first_latents(family, generators(1)), timestep)
    found, asked = [], [captions[0], None]
    if family.has_guidance_embedding:
        family.guidance, asked = 3.0, asked[:1]
    for caption in asked:
        family.predict(denoiser, latents, timestep.expand(1), family.encode_prompts([caption]))
        ((_, output),) = calls.pop()
        found.append(min(range(len(rows)), key=lambda i: (rows[i] - output[0]).abs().max()))
        torch.testing.assert_close(output[0], rows[found[-1]], rtol=1e-5, atol=1e-5)
    assert len(rows) == len(set(found)), "each of the pipeline's rows is one of ours"


def test_captions_are_encoded_the_same_whatever_is_beside_them(family, captions):
    alone = [family.encode_prompts([caption]) for caption in (*captions[:2], None)]
    together = family.encode_prompts([None, captions[1], captions[0], captions[2], captions[0], None])
    for caption, place in ((0, 2), (1, 1), (0, 4), (2, 0), (2, 5)):
        for name, value in alone[caption].items():
            assert torch.equal(together[name][place], value[0]), name


def a_batch(family, captions: list[str]) -> tuple:
    """Latents, timesteps and conditioning of two captions of different lengths."""
    torch.manual_seed(2)
    latents = torch.randn(2, *first_latents(family, generators(1)).shape[1:])
    timesteps = torch.tensor([100.0, 700.0] if family.schedule.has_continuous_time else [100, 700])
    return latents, timesteps, family.encode_prompts([captions[1], captions[0]])


def gradients(family, denoiser, batch) -> dict[str, torch.Tensor]:
    denoiser.zero_grad()
    family.predict(denoiser, *batch).square().mean().backward()
    return {name: parameter.grad for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("tiny-dit", "tiny-ddpm")])
def test_encoders_whose_weights_stay_on_the_disk(family, captions):
    offloaded = dataclasses.replace(family, offload_text_encoders=True, _parts={})
    wanted, found = (made.encode_prompts([*captions[:2], None]) for made in (family, offloaded))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted) and found.keys() == wanted.keys()
    for part, module in offloaded.frozen_modules().items():
        assert part == family.image_part or all(weight.is_meta for weight in module.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_frozen_parts_in_half_precision_are_those_of_diffusers(family, precision, dtype):
    """Rotary frequencies stay in float32, and in fp16 what of T5 would overflow."""
    denoiser = {family.denoiser_part: None}
    theirs = DiffusionPipeline.from_pretrained(family.source, torch_dtype=dtype, **denoiser)
    family.move_frozen_parts(SimpleNamespace(device=torch.device("cpu"), mixed_precision=precision), TrainConfig())
    for part, module in family.frozen_modules().items():
        ours = dict([*module.named_parameters(), *module.named_buffers()])
        plain = getattr(theirs, part)
        plain = dict([*plain.named_parameters(), *plain.named_buffers()])
        assert ours.keys() == plain.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor.to(plain[key].dtype), plain[key]), f"{part}.{key}"


BY_HAND = ("tiny-sdxl", "tiny-sd3", "tiny-flux2-klein", "tiny-pixel")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in BY_HAND else [pytest.mark.slow]) for n in FAMILIES], indirect=True
)
def test_the_first_loss_and_gradient_are_the_textbooks(name, family_run, family):
    """By hand from the keyed draws, the VAE's posterior and the objective's formula, the whole batch at once."""
    argv = [*family_run, "--train.max_steps", "1"]
    config, schedule = parse_config(argv), family.schedule
    logged = metrics_without_times(train(argv))[0]
    samples = Samples(data_of(map_rows(config.data)), config.data, 0, 2)
    batch = collate([samples[k] for k in range(2)])
    latents = batch["pixel_values"]
    if family.image_part is not None:
        vae = family.part(family.image_part)
        pixels = latents[:, :, None] if name == "tiny-qwen-image" else latents  # a video of one frame
        encoded = vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            draw = keyed_randn(0, "vae_noise", range(2), family.encode_images(latents).shape[2:])
            latents = encoded.latent_dist.mean + encoded.latent_dist.std * draw.view_as(encoded.latent_dist.mean)
        else:
            latents = encoded.latent  # Sana's VAE draws nothing
        latents = latents[:, :, 0] if name == "tiny-qwen-image" else latents
    latents = family.normalise(latents)
    noise = keyed_randn(0, "noise", range(2), latents.shape[1:])
    shift = family.shift(*latents.shape[2:])
    timesteps = sample_timesteps(config.timesteps, schedule, 0, range(2), 2, shift)
    if schedule.path == "linear":
        sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - sigmas) * latents + sigmas * noise, noise - latents
        target = latents if name == "tiny-pixel" else target
    else:
        plain = DDPMScheduler.from_config(family.sampler.config)
        noisy = plain.add_noise(latents, noise, timesteps)
        is_v = plain.config.prediction_type == "v_prediction"
        target = plain.get_velocity(latents, noise, timesteps) if is_v else noise
    denoiser = family.load_denoiser().train()
    torch.manual_seed(seed_for(0, "model", 0))
    conditioning = family.encode_prompts(batch["captions"])
    if name == "tiny-sdxl":
        conditioning["time_ids"] = batch["sizes"]
    loss = (family.predict(denoiser, noisy, timesteps, conditioning) - target).square().mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in denoiser.parameters() if p.grad is not None]).norm()
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_every_weight_that_is_trained_has_a_gradient(name, family, denoiser, captions):
    """Which DDP relies on; and checkpointing, which hands what it is told on to the blocks, leaves it as it is."""
    batch = a_batch(family, captions)
    plain = gradients(family, denoiser, batch)
    assert [name for name, gradient in plain.items() if gradient is None] == []
    if "train.gradient_checkpointing" in REFUSED.get(name, ()):
        return
    denoiser.enable_gradient_checkpointing()
    for weight, gradient in gradients(family, denoiser, batch).items():
        torch.testing.assert_close(gradient, plain[weight], rtol=1e-4, atol=1e-7, msg=weight)


@torch.no_grad()
def test_flops_can_be_counted(family, denoiser, captions):
    *inputs, conditioning = a_batch(family, captions)
    assert training_flops(denoiser, family.predict, *inputs, conditioning=conditioning) > 1e6


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_what_the_mask_leaves_out_does_not_matter(family, denoiser, captions):
    """Neither what is there nor how much: caches cut it off."""
    latents, timesteps, conditioning = a_batch(family, captions)
    masks = {name: mask for name, mask in conditioning.items() if name.endswith("_mask")}
    expected = family.predict(denoiser, latents, timesteps, conditioning)
    for mask_name, mask in masks.items():
        assert (mask.int().diff(dim=1) <= 0).all(), "a prefix"
        name, lengths = mask_name.removesuffix("_mask"), mask.sum(1)
        assert len(set(lengths.tolist())) == 2 and mask.shape[1] == family.text_length
        garbage = conditioning[name].masked_fill(~mask.bool()[..., None], 7.0)
        cut = {key: value[:, : lengths.max()] for key, value in conditioning.items() if key in (name, mask_name)}
        for changed in ({name: garbage}, cut):
            torch.testing.assert_close(
                family.predict(denoiser, latents, timesteps, conditioning | changed), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", [name for name in GIVES_SIGMAS if name != "tiny-flux2-klein"])  # by its steps, too
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_a_dynamic_shift_is_what_the_sampler_is_told(family, denoiser, monkeypatch, size):
    family.sampler = type(family.sampler).from_config(family.sampler.config, use_dynamic_shifting=True)
    told, set_timesteps = [], type(family.sampler).set_timesteps

    @functools.wraps(set_timesteps)  # whose signature the pipeline looks at
    def tell(*args, **given):
        told.append(given)
        return set_timesteps(*args, **given)

    monkeypatch.setattr(type(family.sampler), "set_timesteps", tell)
    family.generate(denoiser, CAPTIONS[:1], *size, 2, 1.0, 0.0, generators(1))
    latent_size = (side // family.vae_scale_factor for side in size)
    assert family.shift(*latent_size) == pytest.approx(math.exp(told[0]["mu"]))


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux", "tiny-sana", "tiny-flux2-klein"])
def test_a_shift_by_tokens_is_that_of_the_pipeline(name, family_run, monkeypatch):
    """At the sizes that the field names its own, and between and beyond exp of what is linear in the tokens."""
    config = parse_config([*family_run, *options({"scheduler.flow_shift_by_tokens": [[16, 2.0], [64, 4.0]]})])
    if name in ("tiny-sana", "tiny-flux2-klein"):
        with pytest.raises(
            InputError, match=r"^scheduler.flow_shift_by_tokens: a \w+Pipeline does not tell its sampler"
        ):
            load_family(config)
        return
    family, told, set_timesteps = load_family(config), [], FlowMatchEulerDiscreteScheduler.set_timesteps
    side = family.patch_size * family.vae_scale_factor

    @functools.wraps(set_timesteps)
    def tell(*args, **given):
        told.append(given["mu"])
        return set_timesteps(*args, **given)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", tell)
    denoiser = family.load_denoiser().eval()
    for (height, width), expected in {(4, 4): 2.0, (4, 10): 2.0**1.5, (8, 8): 4.0}.items():
        family.generate(denoiser, CAPTIONS[:1], height * side, width * side, 1, 1.0, 0.0, generators(1))
        sizes = [length * side // family.vae_scale_factor for length in (height, width)]
        assert family.shift(*sizes) == pytest.approx(math.exp(told[-1])) == pytest.approx(expected)


@pytest.mark.parametrize("name", GIVES_SIGMAS)
def test_a_sampler_that_takes_no_sigmas_is_refused(family_run):
    argv = [*family_run, "--scheduler.sampler", "DPMSolverMultistepScheduler", "--scheduler.flow_shift", "2"]
    with pytest.raises(InputError, match=r"^scheduler.sampler: a \w+Pipeline gives its sampler sigmas and a shift"):
        load_family(parse_config(argv))


def test_it_trains_resumes_and_exports(family_run, captions, tmp_path):
    """Exactly; and plain diffusers makes of what it leaves the picture that the family makes of it."""
    argv = [*family_run, *options({"evaluation.prompts": captions[:2], "train.eval_every": 4})]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    train([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)
    assert metrics_without_times(tmp_path / "resumed") == metrics_without_times(unbroken)[2:]
    exported = ["--model.pretrained_model_name_or_path", str(unbroken / "pipeline")]
    family = load_family(parse_config([*argv, *exported]))
    images = family.generate(family.load_denoiser(), captions[:2], 32, 32, 2, 3.0, 0.0, generators(2))
    pipeline = DiffusionPipeline.from_pretrained(unbroken / "pipeline")
    assert type(pipeline) is family.pipeline_class
    pipeline.set_progress_bar_config(disable=True)
    sized = {"height": 32, "width": 32, "use_resolution_binning": False}
    known = inspect.signature(type(pipeline).__call__).parameters
    sized = {name: value for name, value in (sized | family.text_options).items() if name in known}
    draws, at_once = generators(2), 1 if isinstance(family, PRXPixel) else 2  # it guides one image at a time
    again = []
    for start in range(0, 2, at_once):
        lot = slice(start, start + at_once)
        options_of_call = family.call_options(captions[:2][lot], 3.0)
        again += pipeline(**sized, **options_of_call, num_inference_steps=2, generator=draws[lot]).images
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]


@pytest.mark.slow
def test_splits_and_caches_change_nothing(name, family_run, tmp_path):
    argv = [*family_run, *options({"data.center_crop": True, "train.max_steps": 3})]
    fields = {
        "plain": {},
        "parts": {"train.gradient_accumulation_steps": 2},
        "caches": CACHES | {"data.cache_dir": tmp_path / "cache"},
    }
    if name in PIXELS:
        fields["caches"]["data.cache_latents"] = False
    if name == "tiny-ddpm":  # it has no encoders at all
        del fields["caches"]
    runs = {name: train([*argv, *options(own | {"train.output_dir": tmp_path / name})]) for name, own in fields.items()}
    losses = {name: [line["loss"] for line in metrics_without_times(run)] for name, run in runs.items()}
    assert losses["parts"] == pytest.approx(losses["plain"], rel=1e-5)
    if "caches" in losses:
        assert losses["caches"] == pytest.approx(losses["plain"], rel=1e-6)


@pytest.mark.slow
def test_strategies_train_and_resume(family_run, name, tmp_path):
    fields = DREAM | {"loss.weighting": "min_snr", "train.gradient_checkpointing": True}
    argv = [*family_run, *options({key: value for key, value in fields.items() if key not in REFUSED.get(name, [])})]
    unbroken = train([*argv, "--output-dir", str(tmp_path / "unbroken")])
    resumed = ["--output-dir", str(tmp_path / "resumed"), "--resume-from", str(unbroken / "checkpoint-2")]
    train([*argv, *resumed])
    assert pipeline_bytes(tmp_path / "resumed") == pipeline_bytes(unbroken)


@pytest.mark.parametrize("name", ["tiny-sdxl"])
def test_a_run_whose_encoders_stay_on_the_disk(family_run, captions, tmp_path):
    pictures = {"train.eval_every": 1, "evaluation.prompts": captions[:2]}
    argv = [*family_run, *options(CACHES | pictures | {"train.max_steps": 2})]
    runs = []
    for where in ("memory", "disk"):
        fields = {"data.cache_dir": tmp_path / where / "cache", "train.output_dir": tmp_path / where}
        runs.append(train([*argv, *options(fields | {"model.offload_text_encoders": where == "disk"})]))
    assert pipeline_bytes(runs[0]) == pipeline_bytes(runs[1])
    assert metrics_without_times(runs[0]) == metrics_without_times(runs[1])
    grids = [[path.read_bytes() for path in sorted(run.rglob("*.png"))] for run in runs]
    assert grids[0] == grids[1] != []
    with pytest.raises(InputError, match=r"^model.offload_text_encoders: needs data.cache_text, .*, got True"):
        parse_config([*family_run, "--model.offload_text_encoders", "true"])


def test_the_derivative_along_a_path_is_that_of_finite_differences(name, family, denoiser, captions, monkeypatch):
    """In float64, but for what models compute in float32 whatever they are given."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    denoiser = denoiser.double()
    conditioning = family.encode_prompts(captions[:2])
    conditioning = {k: v.double() if v.is_floating_point() else v for k, v in conditioning.items()}
    latents, along = torch.randn(2, 2, *first_latents(family, generators(1)).shape[1:], dtype=torch.float64)
    timesteps = torch.tensor([300.3, 701.7], dtype=torch.float64)
    predict = functools.partial(family.predict, denoiser, conditioning=conditioning)
    with probing(denoiser):
        _, derivative = torch.func.jvp(predict, (latents, timesteps), (along, torch.full_like(timesteps, 1000)))
        h = 1e-5
        ahead, behind = (predict(latents + s * along, timesteps + 1000 * s) for s in (h, -h))
    expected = (ahead - behind) / (2 * h)
    assert (derivative - expected).abs().max() < 2e-3 * expected.abs().max()
