"""Loading what `difftrain generate` draws with, and drawing a picture; writing.py is the same for texts."""

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from tqdm import tqdm

from difftrain_utils.builtins import tones
from difftrain_utils.builtins.checkpoints import AUDIO_BUILTINS, BUILTINS, VIDEO_BUILTINS
from difftrain_utils.commands.posthoc_ema import average_of_width, check_same_parameters
from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import MIXED_PRECISION, Config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig, VideoModelConfig
from difftrain_utils.config.video_data import VideoDataConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import LOAD_ERRORS, InputError, RowError, blame, check_installed, some, warn
from difftrain_utils.evaluation.guidance import GuidedDenoiser, check_guidance, load_weaker
from difftrain_utils.families.diffusers_audio_family import DiffusersAudioFamily
from difftrain_utils.families.diffusers_family import DiffusersFamily, move_part
from difftrain_utils.families.diffusers_video_family import DiffusersVideoFamily
from difftrain_utils.families.family import Family
from difftrain_utils.families.load import describe_family, load_family, trained_models
from difftrain_utils.media.audio import Sound
from difftrain_utils.media.image import read_image_file
from difftrain_utils.media.video import Clip
from difftrain_utils.optimization.trained import is_trained_whole, saved_state, trained_parameters, trained_weights
from difftrain_utils.run.run_folder import read_manifest
from difftrain_utils.run.saved_tensors import SavedTensors
from difftrain_utils.run.source import EMA, RAW, Source
from difftrain_utils.run.weights import load_weights

for library in (diffusers.utils.logging, transformers.logging):
    library.disable_progress_bar()

FPS = 16.0  # of clips of a model that is not told how many frames a second has, where no run says it: Wan's
TOLD_GUIDANCE = "time_cond_proj_dim"  # of a UNet's config: its pipeline tells it guidance_scale - 1


@dataclass
class Settings:
    """Of each picture, clip or sound. What is None, the pipeline has a default for."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    seconds: float | None = None
    """Of a sound, which may be longer by what the model makes at once."""
    first_frame: Image.Image | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    guidance_rescale: float = 0.0
    guidance_interval: list[float] | None = None
    autoguidance: str | None = None


@dataclass
class Loaded:
    """A pipeline and its family; of a run's checkpoints and averages also what they are weights of, and whose weights
    these are now (`use`)."""

    family: DiffusersFamily
    pipeline: DiffusionPipeline
    models: dict[str, torch.nn.Module] = dataclasses.field(default_factory=dict)
    source: Source | None = None
    weaker: torch.nn.Module | None = None
    """That of autoguidance, once it is asked for."""

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """What the pipeline is called with."""
        return dict(inspect.signature(type(self.pipeline).__call__).parameters)

    @property
    def takes_prompts(self) -> bool:
        return bool({"prompt", "class_labels"} & self.arguments.keys())


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────
def find_device(name: str | None, precision: str | None, offload: bool = False) -> torch.device:
    """The device of this name, or else a GPU, if there is one, or the CPU.

    Raises:
        InputError: there is none, or it cannot draw in this precision, or be offloaded from.
    """
    with blame(f"--device: {name!r} is not there", RuntimeError, AssertionError):
        if name is None:
            device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        else:
            device = torch.empty(0, device=name).device
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision: fp16 needs a GPU; a CPU has bf16 and fp32")
    if offload and device.type == "cpu":
        raise InputError("--offload: from a GPU to main memory, where everything is on a CPU")
    return device


def own_precision(source: Source, device: torch.device) -> str:
    """That of the run; of a pipeline that is of none fp32, and on a GPU bf16. A CPU has no fp16."""
    if source.record is None:
        return "fp32" if device.type == "cpu" else "bf16"
    with blame(str(source.record), *LOAD_ERRORS):
        precision = {name: field for field, name in MIXED_PRECISION.items()}[
            read_manifest(source.record)["mixed_precision"]
        ]
    return "fp32" if precision == "fp16" and device.type == "cpu" else precision


def load(
    source: Source, config: TextToImageConfig | None, device: torch.device, precision: str, offload: bool = False
) -> Loaded:
    """A pipeline in "fp32", "bf16" or "fp16" on the device, or with `offload` only the part that computes; `config` is
    that of the run, where the source is not a pipeline itself.

    Raises:
        InputError: it cannot be loaded, or is not what the run was trained from.
    """
    dtype = weight_dtype(precision)
    if source.path in BUILTINS:
        config = TextToImageConfig(ModelConfig(source.path), DataConfig("builtin:shapes"))
    if source.path in VIDEO_BUILTINS:
        config = TextToVideoConfig(VideoModelConfig(source.path), VideoDataConfig("builtin:moving-shapes"))
    if source.path in AUDIO_BUILTINS:
        sizes = {"waveform_length": 4096, "sampling_rate": tones.LEAST_RATE, "audio_channels": 1}
        config = TextToAudioConfig(ModelConfig(source.path), AudioDataConfig("builtin:tones", **sizes))
    if config is None:
        family = describe_family(source.path)
        family.tells_gap = source.tells_gap
        with blame(source.path, *LOAD_ERRORS, ImportError):
            rounded = {} if dtype == torch.float32 else {"torch_dtype": dtype}
            pipeline = DiffusionPipeline.from_pretrained(source.path, **rounded)
        loaded = Loaded(family, pipeline)
    else:
        loaded = _load_run(source, config)
    for part in loaded.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            move_part(part.eval(), "cpu" if offload else device, dtype)
    loaded.pipeline.set_progress_bar_config(disable=True)
    if isinstance(loaded.family, DiffusersVideoFamily) and not loaded.family.fps:
        told = loaded.arguments.get("frame_rate")
        loaded.family.fps = told.default if told else FPS
    if loaded.models:
        use(loaded, source, config)
    if offload:
        loaded.pipeline.enable_model_cpu_offload(device=device)
    return loaded


def _load_run(source: Source, config: TextToImageConfig) -> Loaded:
    """What a run was trained from, as it was; with its exported adapters, or to be given weights that it has saved."""
    config.model.offload_text_encoders = config.data.cache_latents = config.data.cache_text = False
    config.evaluation = type(config.evaluation)()
    leave_out_training(config)
    family = load_family(config)
    if source.kind not in ("checkpoint", "weights", "average"):
        denoiser, models = family.load_denoiser(), {}
    else:
        models = trained_models(family, config)
        denoiser = models["denoiser"]
    if source.record is not None:
        check_base(family, denoiser, source.record, replaced=bool(models) and is_trained_whole(denoiser))
    pipeline = family.pipeline(denoiser)
    if source.kind == "lora":
        verbosity = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity_error()  # it would tell of each text encoder that has no adapters
        with blame(source.path, *LOAD_ERRORS):
            pipeline.load_lora_weights(source.path)
        diffusers.utils.logging.set_verbosity(verbosity)
    return Loaded(family, pipeline, models)


def leave_out_training(config: Config) -> None:
    """Let models, in place, be those that plain libraries use. Raises InputError if what adapters need is missing."""
    check_installed({field: package for field, package in config.needed_packages().items() if field == "model.lora"})
    train = config.train
    train.gradient_checkpointing = train.plain_attention = train.channels_last = False
    train.compile = None


def check_base(family: Family, denoiser: torch.nn.Module, record: Path, replaced: bool) -> None:
    """Refuse another base than that of the run, but for a denoiser that is `replaced` as a whole."""
    with blame(str(record), *LOAD_ERRORS):
        base = read_manifest(record)["base_model"]
        then, now = base["sha256"], family.digests(denoiser)
        parts = [part for part in now if not (replaced and part == family.denoiser_part)]
        if differing := [part for part in parts if then.get(part) != now[part]]:
            raise InputError(f"{base['name']}: not what {record} was trained from: {', '.join(differing)} differ")


@torch.no_grad()
def use(loaded, source: Source, config: Config) -> None:
    """Give the `models` of what is loaded the weights of a checkpoint or an average of its run; its `source` says
    whose they have.

    Raises:
        InputError: it is none of these models, or has not the weights that are asked for.
    """
    if source == loaded.source:
        return
    loaded.source, denoiser, folder = source, loaded.models["denoiser"], Path(source.path)
    models = [model for name in ("denoiser", "text_encoders") if (model := loaded.models.get(name)) is not None]
    if source.kind == "average":
        average = average_of_width(folder.parent, source.weights, source.step, ("--weights", "--checkpoint"))
        parameters = trained_weights(denoiser)
        check_same_parameters(average, parameters, source.path, "the run's denoiser")
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
        return
    if source.kind == "weights":
        load_weights(folder, denoiser, loaded.models.get("text_encoders"))
        return
    if source.weights == RAW:
        _refuse_two_kinds_of_raw(config)
    with blame(source.path, *LOAD_ERRORS), SavedTensors(folder) as saved:
        for name in ("denoiser", "text_encoders"):
            if name in loaded.models:
                saved.load(name, saved_state(loaded.models[name]))
        if source.weights == EMA:
            saved.load("ema", {str(i): p.detach() for i, p in enumerate(trained_parameters(*models))})


def _refuse_two_kinds_of_raw(config: Config) -> None:
    """A schedule-free optimizer trains for other weights than those in a checkpoint, and makes them at the end."""
    module, _, name = config.optimizer.class_path.rpartition(".")
    with blame(f"optimizer.class_path: cannot import {config.optimizer.class_path!r}", ImportError, AttributeError):
        optimizer = getattr(importlib.import_module(module), name)
    if hasattr(optimizer, "eval"):
        raise InputError(
            f"--weights raw: {config.optimizer.class_path} takes gradients at other weights than those that it trains "
            "for; draw with the average (ema) or, of a finished run, with what it exported"
        )


def scale_adapters(parts: Iterable[Any], scale: float) -> None:
    """Let adapters, of the parts that are modules, add `scale` times what they have learned to add; 1: as trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in parts:
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            if isinstance(module, BaseTunerLayer):
                for adapter in module.active_adapters:
                    module.set_scale(adapter, scale)


def read_first_frame(name: str, height: int | None, width: int | None) -> Image.Image:
    """An image, as the data of a run of this size would have its middle. Raises InputError if it is none."""
    try:
        found = read_image_file(name)
    except RowError as error:
        raise InputError(f"--first-frame: {error}") from None
    return found if height is None else ImageOps.fit(found, (width, height), Image.Resampling.LANCZOS)


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────────────────
def check(loaded: Loaded, prompts: list[str], settings: Settings) -> None:
    """Raise InputError for prompts and settings that the pipeline does not take, and warn of a UNet that is told by
    guidance_scale what nobody has said."""
    family, known, name = loaded.family, loaded.arguments, type(loaded.pipeline).__name__
    is_known = type(family) is not DiffusersFamily
    if prompts and not loaded.takes_prompts:
        raise InputError(f"PROMPT: a {name} takes none, got {prompts[0]!r:.60}")
    if not prompts and loaded.takes_prompts:
        raise InputError(f"PROMPT: a {name} needs one, or --prompts FILE")
    family.check_captions(prompts, "PROMPT")
    if settings.height is not None and is_known:
        family.check_size(settings.height, settings.width, "--height and --width")
    if settings.num_frames is not None and is_known:
        family.check_frames(settings.num_frames, "--num-frames")
    if settings.seconds is not None and is_known and settings.seconds > family.max_length_in_s:
        raise InputError(f"--seconds: a {name} takes {family.max_length_in_s:g} at most, got {settings.seconds:g}")
    gives = getattr(family, "first_frames", "none")
    if settings.first_frame is not None and gives == "none":
        raise InputError(f"--first-frame: a {name} is given none")
    if settings.first_frame is None and gives == "all":
        raise InputError(f"--first-frame: a {name} makes clips of an image: give one")
    if settings.first_frame is not None and family.noise.frame_correlation and not family.takes_image_and_latents:
        name = family.image_pipeline_class.__name__
        raise InputError(f"--first-frame: a {name} takes none with the noise of this run (noise.frame_correlation)")
    options = {"--steps": ("num_inference_steps", settings.steps)}
    if not is_known:
        options |= {"--height": ("height", settings.height), "--guidance": ("guidance_scale", settings.guidance)}
    for option, (argument, value) in options.items():
        if value is not None and argument not in known:
            raise InputError(f"{option}: a {name} has none, got {value}")
    draws_between = isinstance(loaded.pipeline.scheduler, diffusers.LCMScheduler) and settings.steps != 1
    if draws_between and not hasattr(loaded.pipeline, "prepare_extra_step_kwargs"):
        raise InputError(f"--steps: must be 1, a {name} gives its sampler no generator for the noise between steps")
    unet, is_open = getattr(loaded.pipeline, "unet", None), settings.guidance is None and "guidance_scale" in known
    if is_open and not family.tells_gap and unet is not None and unet.config.get(TOLD_GUIDANCE):
        warn(
            f"--guidance: none is given, so the {name} tells its UNet ({TOLD_GUIDANCE}) of its default, "
            f"{known['guidance_scale'].default}; what train_few_step.py has trained needs 1 + 1/N with --steps N"
        )
    if settings.negative_prompt is None:
        return
    own = known.get("true_cfg_scale") or known.get("guidance_scale")
    guidance = settings.guidance if settings.guidance is not None or own is None else own.default
    if "negative_prompt" not in known or (is_known and family.has_guidance_embedding):
        raise InputError(f"--negative-prompt: this {name} takes none, got {settings.negative_prompt!r:.60}")
    if guidance is not None and guidance <= 1:
        raise InputError(f"--negative-prompt: counts with --guidance above 1 alone, which is {guidance:g}")


def guide(loaded: Loaded, settings: Settings, device: torch.device, precision: str) -> Settings:
    """Let the pipeline's denoiser guide in the interval alone, or by a weaker model, if the settings say so, and return
    those that the pipeline is called with then. What other settings, of the same weaker model, did before is undone.

    Raises:
        InputError: the pipeline does not guide, or the weaker model cannot be loaded.
    """
    interval, name, family = settings.guidance_interval, settings.autoguidance, loaded.family
    pipeline, part = loaded.pipeline, family.denoiser_part
    if isinstance(guided := getattr(pipeline, part, None), GuidedDenoiser):
        setattr(pipeline, part, guided.strong)
    if interval is None and name is None:
        return settings
    if settings.guidance is None or settings.guidance <= 1:
        raise InputError(f"--guidance: must be above 1 with an interval or autoguidance, got {settings.guidance}")
    check_guidance(family, settings)
    if name is not None and loaded.weaker is None:
        loaded.weaker = load_weaker(family, pipeline.scheduler, name, device, weight_dtype(precision))
    denoiser, scale = getattr(pipeline, part), settings.guidance
    guided = GuidedDenoiser(denoiser, family, pipeline.scheduler, interval, loaded.weaker, scale)
    setattr(pipeline, part, guided)
    return settings if loaded.weaker is None else dataclasses.replace(settings, guidance=1.0, guidance_rescale=0.0)


def draw_all(
    loaded: Loaded, pictures: Iterable, settings: Settings, config: TextToImageConfig | None
) -> Iterator[tuple[Any, Image.Image | Clip | Sound]]:
    """Pictures (`prompt`, `source`, `scale`, `seed`), each with its image, clip or sound; those of one source, and of
    one scale, one after the other."""
    scale = None
    if settings.fps is not None:
        loaded.family.fps = settings.fps
    if settings.first_frame is not None:
        loaded.pipeline = loaded.family.image_pipeline(loaded.pipeline)
    for picture in tqdm(pictures, unit="sample", leave=False, disable=None):
        if loaded.models:
            use(loaded, picture.source, config)
        if picture.scale != scale:
            scale_adapters(loaded.pipeline.components.values(), picture.scale)
            scale = picture.scale
        yield picture, draw(loaded, picture.prompt, picture.seed, settings)


def draw(loaded: Loaded, prompt: str, seed: int, settings: Settings) -> Image.Image | Clip | Sound:
    """The picture, clip or sound that plain diffusers makes with `torch.Generator().manual_seed(seed)`, or where a
    run's noise has `frame_correlation`, of such noise."""
    generators = [torch.Generator().manual_seed(seed)]
    options = loaded.family.picture_options(
        loaded.pipeline,
        [prompt],
        settings.height,
        settings.width,
        settings.steps,
        settings.guidance,
        settings.guidance_rescale,
        None if settings.negative_prompt is None else [settings.negative_prompt],
    )
    if is_video := isinstance(loaded.family, DiffusersVideoFamily):
        options |= {} if settings.num_frames is None else {"num_frames": settings.num_frames}
        options |= loaded.family.first_noise(settings.num_frames, settings.height, settings.width, generators)
        options |= {} if settings.first_frame is None else {"image": settings.first_frame}
        options["output_type"] = "pil"
    if is_sound := isinstance(loaded.family, DiffusersAudioFamily):
        length = waveform_length(loaded.family, settings.seconds)
        options |= {} if length is None else loaded.family.length_options(loaded.pipeline, length, generators)
    if unknown := [name for name in options if name not in loaded.arguments]:
        raise InputError(f"a {type(loaded.pipeline).__name__} takes no {some(unknown)}")
    with blame(f"{loaded.pipeline.name_or_path or loaded.family.source}", ValueError, TypeError):
        made = loaded.pipeline(**options, generator=generators)
    if is_sound:
        return Sound(made.audios[0].float().cpu().numpy(), loaded.family.sampling_rate)
    return Clip(made.frames[0], loaded.family.fps) if is_video else made.images[0]


def waveform_length(family: DiffusersAudioFamily, seconds: float | None) -> int | None:
    """Samples of a sound of so many seconds, as whole latents; None: the pipeline has a default."""
    if seconds is None:
        return None
    return -(-round(seconds * family.sampling_rate) // family.size_multiple) * family.size_multiple


def describe(loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """Sampler and settings, by name, as far as they are known before drawing."""
    default = loaded.arguments.get("num_inference_steps")
    length = waveform_length(loaded.family, settings.seconds)
    found = {
        "sampler": type(loaded.pipeline.scheduler).__name__,
        "steps": default.default if settings.steps is None and default else settings.steps,
        "guidance": settings.guidance,
        "size": None if settings.height is None else f"{settings.height} x {settings.width}",
        "frames": settings.num_frames,
        "fps": settings.fps,
        "seconds": None if length is None else f"{length / loaded.family.sampling_rate:.6g}",
        "negative_prompt": settings.negative_prompt,
        "guidance_interval": settings.guidance_interval and "{} to {}".format(*settings.guidance_interval),
        "autoguidance": settings.autoguidance,
    }
    return {name: value for name, value in found.items() if value is not None}
