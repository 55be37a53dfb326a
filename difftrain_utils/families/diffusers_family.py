"""What all families of checkpoints in diffusers' format have in common."""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download
from PIL import Image

from difftrain_utils.config.config import Config
from difftrain_utils.devices import to_device
from difftrain_utils.errors import LOAD_ERRORS, InputError, RunError, blame, some
from difftrain_utils.families.family import Conditioning
from difftrain_utils.families.samplers import build_schedule
from difftrain_utils.files import file_digest, part_digest, weights_digest
from difftrain_utils.keyed_random import keyed_randn, seed_for
from difftrain_utils.objective.schedule import Schedule

ENCODED_AT_ONCE = 16  # captions on a GPU
INNER_FIELDS = frozenset(
    (
        *("sample_size", "dropout", "act_fn", "activation_fn", "norm_eps", "norm_num_groups", "upcast_attention"),
        *("block_out_channels", "layers_per_block", "down_block_types", "mid_block_type", "up_block_types"),
        *("attention_head_dim", "num_attention_heads", "transformer_layers_per_block", "num_layers"),
        *("num_single_layers", "only_cross_attention", "dual_cross_attention", "use_linear_projection"),
        *("resnet_time_scale_shift", "resnet_skip_time_act", "resnet_out_scale_factor", "downsample_padding"),
        *("mid_block_scale_factor", "mid_block_only_cross_attention", "cross_attention_norm", "attention_type"),
    )
)


@dataclass
class DiffusersFamily:
    """A `Family` of checkpoints in diffusers' format, but for what makes it one: a subclass says of which parts its
    pipeline consists, and how images and captions are encoded and the denoiser is called.

    Frozen parts are loaded when they are first used (`part`).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_part: ClassVar[str] = "transformer"
    image_part: ClassVar[str | None] = "vae"
    text_parts: ClassVar[tuple[str, ...]] = ()
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS
    """The fields of a denoiser's config in which it may differ from the checkpoint's: they say what is within it, and
    all others what goes in and out."""
    has_init_noise_sigma: ClassVar[bool] = False
    """Whether the pipeline asks its sampler for `init_noise_sigma`, which the flow matching ones have not."""

    source: str
    """The folder or hub name of the checkpoint, at `revision` and `variant`."""
    revision: str | None
    variant: str | None
    model_index: dict[str, Any]
    """The content of its model_index.json."""
    schedule: Schedule
    sampler: SchedulerMixin
    """Of the same schedule, for pipelines."""
    init_seed: int | None = None
    """The seed of the denoiser's random weights; None: the checkpoint's weights."""
    vae_slicing: bool = False
    channels_last: bool = False
    """The VAE's; see `train.channels_last`."""
    cached: tuple[str, ...] = ()
    """The frozen parts that training does without: their work is cached."""
    device: torch.device | str = "cpu"
    weight_dtype: torch.dtype = torch.float32
    _parts: dict[str, Any] = field(default_factory=dict, repr=False)
    _configs: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, from_scratch: bool) -> "DiffusersFamily":
        """Load what is frozen, but for the parts whose work is cached. Raises InputError if a part cannot be loaded."""
        revision, data = config.model.revision, config.data
        own = load_part(source, model_index, "scheduler", revision=revision)
        if not isinstance(own, SchedulerMixin):
            raise ValueError(f"scheduler: a {type(own).__name__} is no scheduler")
        schedule, sampler = build_schedule(type(own), own.config, config, cls.has_init_noise_sigma)
        encoders = [part for part in cls.text_parts if not part.startswith("tokenizer")]
        cached = (cls.image_part,) if data.cache_latents and cls.image_part else ()
        family = cls(
            source,
            revision,
            config.model.variant,
            model_index,
            schedule,
            sampler,
            init_seed=config.train.seed if from_scratch else None,
            vae_slicing=config.model.vae_slicing,
            channels_last=config.train.channels_last,
            cached=(*cached, *(encoders if data.cache_text else ())),
        )
        has_rescale = "guidance_rescale" in inspect.signature(cls.pipeline_class.__call__).parameters
        if config.evaluation.guidance_rescale and not has_rescale:
            raise InputError(f"evaluation.guidance_rescale: a {cls.pipeline_class.__name__} cannot do that")
        if cls.image_part:
            factor = family.config_of(cls.image_part).get("scaling_factor", 1.0)
            with blame_part(source, cls.image_part):
                if not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
                    raise ValueError(f"scaling_factor must be a number other than 0, got {factor!r}")
        for part in family.frozen_parts:
            if part not in family.cached:
                family.part(part)
        return family

    # ── The parts ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """The names of all parts but the denoiser and the sampler."""
        return (*((self.image_part,) if self.image_part else ()), *self.text_parts)

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of `pipeline_class` besides the parts."""
        return {}

    def part(self, name: str) -> Any:
        """A frozen part, loaded when first asked for: on the device, in `weight_dtype`, not to be trained."""
        if name not in self._parts:
            self._parts[name] = self._load(name)
        return self._parts[name]

    def _load(self, name: str) -> Any:
        at = {"revision": self.revision}
        if name.startswith("tokenizer"):
            return load_part(self.source, self.model_index, name, **at)
        at["variant"] = self.variant
        if self.model_index[name][0] == "transformers":  # which loads in the checkpoint's precision else
            at["dtype"] = torch.float32
        part = load_weights(self.source, self.model_index, name, **at).eval().requires_grad_(False)
        if name == self.image_part:
            part.use_slicing = self.vae_slicing
            if self.channels_last:
                torch.nn.Module.to(part, memory_format=torch.channels_last)
        # diffusers' own `to` warns of an empty list of modules
        return torch.nn.Module.to(part, self.device, self.weight_dtype)

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. Random weights are a function of the seed."""
        name, at = self.denoiser_part, {"revision": self.revision}
        if self.init_seed is None:
            return load_weights(self.source, self.model_index, name, variant=self.variant, **at)
        config = load_part(self.source, self.model_index, name, "load_config", **at)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.init_seed, "weights", 0))
            return part_class(self.model_index, name).from_config(config)

    def config_of(self, name: str) -> Any:
        """The config of a part with its defaults, without its weights."""
        if name not in self._configs:
            cls, at = part_class(self.model_index, name), {"subfolder": name, "revision": self.revision}
            with blame_part(self.source, name):
                if self.model_index[name][0] == "transformers":
                    self._configs[name] = cls.config_class.from_pretrained(self.source, **at)
                else:
                    with torch.device("meta"):
                        self._configs[name] = cls.from_config(cls.load_config(self.source, **at)).config
        return self._configs[name]

    def move_frozen_parts(self, accelerator: Accelerator) -> None:
        """Those that are loaded, and those that will be."""
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.device, self.weight_dtype = accelerator.device, half.get(accelerator.mixed_precision, torch.float32)
        for part in self._parts.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, self.device, self.weight_dtype)

    def free_cached(self) -> None:
        for part in self.cached:
            self._parts.pop(part, None)

    # ── What they are, as digests ────────────────────────────────────────────────────────────────────────────
    def digests(self, denoiser: torch.nn.Module) -> dict[str, str]:
        """See `Family`; without loading the encoders. Raises InputError if weights are missing or damaged."""
        encoders = [part for part in self.frozen_parts if not part.startswith("tokenizer")]
        return {self.denoiser_part: weights_digest(denoiser)} | {part: self._digest(part) for part in encoders}

    def describe_parts(self, *parts: str) -> dict[str, str]:
        described = {}
        for part in parts:
            files = sorted(path for path in self._folder(part).iterdir() if path.suffix in (".json", ".txt", ".model"))
            described |= {f"{part}/{path.name}": file_digest(path) for path in files}
            described |= {part: self._digest(part)} if not part.startswith("tokenizer") else {}
        return described

    def _digest(self, part: str) -> str:
        with blame_part(self.source, part):
            return part_digest(self._folder(part), self.variant)

    def _folder(self, part: str) -> Path:
        folder = Path(self.source)
        if not folder.is_dir():  # a hub name, of which all that was loaded lies in one folder of the hub's cache
            folder = Path(hf_hub_download(self.source, "model_index.json", revision=self.revision)).parent
        has_weights = any(path.suffix in (".safetensors", ".bin") for path in (folder / part).glob("*"))
        if not part.startswith("tokenizer") and not has_weights:
            self.part(part)  # downloads it, or says that it is not there
        return folder / part

    # ── What fits ────────────────────────────────────────────────────────────────────────────────────────────
    def check_denoiser(self, denoiser: torch.nn.Module) -> None:
        name, needed = self.pipeline_class.__name__, part_class(self.model_index, self.denoiser_part)
        if not isinstance(denoiser, needed):
            raise RunError(f"a {name} has a {needed.__name__}, not a {type(denoiser).__name__}")
        own, its = self.config_of(self.denoiser_part), denoiser.config
        for field_name in sorted(own.keys() | its.keys()):
            wanted, got = as_json(own.get(field_name)), as_json(its.get(field_name))
            if wanted != got and field_name not in self.free_fields and not field_name.startswith("_"):
                raise RunError(
                    f"a {name} of {self.source} has a denoiser with {field_name} {wanted}, this one has {got}: "
                    "what is called in another way needs a family of its own"
                )

    def check_size(self, height: int, width: int, name: str) -> None:
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            got = height if height == width else f"{height} x {width}"
            raise InputError(f"{name}: {self.source} needs a multiple of {multiple}, got {got}")

    # ── Images and captions ──────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The moments of the VAE's posterior: (batch, 2, channels, height, width)."""
        vae = self.part(self.image_part)
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1)

    def sample_latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, std = moments.float().unbind(1)
        return self.normalise(mean + std * noise)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser takes them, of the VAE's, (batch, channels, …): each channel by its `latents_mean`
        and `latents_std`, then shifted by `shift_factor`, times `scaling_factor`; what the VAE's config does not have
        is left out. Here and nowhere else."""
        config = self.config_of(self.image_part)
        if config.get("latents_mean") is not None:
            mean, std = (
                torch.tensor(config[name], device=latents.device).view(-1, *[1] * (latents.ndim - 2))
                for name in ("latents_mean", "latents_std")
            )
            latents = (latents - mean) / std
        if config.get("shift_factor"):
            latents = latents - config.shift_factor
        return latents * config.get("scaling_factor", 1.0)

    def null_conditioning(self) -> Conditioning:
        return self.encode_prompts([None])

    def encode(self, batch: dict[str, Any], seed: int, purpose: str = "vae_noise") -> tuple[torch.Tensor, Conditioning]:
        moments = batch["moments"] if "moments" in batch else self.encode_images(batch["pixel_values"])
        noise = keyed_randn(seed, purpose, batch["keys"], moments.shape[2:], moments.device)
        conditioning = batch["conditioning"] if "conditioning" in batch else self.encode_prompts(batch["captions"])
        return self.sample_latents(moments, noise), conditioning

    def shift(self, *size: int) -> float:
        """That of the schedule, for all sizes."""
        return self.schedule.shift

    # ── Pipelines ────────────────────────────────────────────────────────────────────────────────────────────
    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        parts = {name: self.part(name) for name in self.frozen_parts} | {self.denoiser_part: denoiser}
        pipeline = self.pipeline_class(**parts, scheduler=self.sampler, **self.pipeline_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Image.Image]:
        return self.pipeline(denoiser)(
            list(prompts),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **({"guidance_rescale": guidance_rescale} if guidance_rescale else {}),
            generator=list(generators),
        ).images

    def save_pipeline(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`: the frozen parts in float32 and unused (a tokenizer that has padded would be saved with its
        padding)."""
        self.check_denoiser(denoiser)
        fresh = dataclasses.replace(self, device="cpu", weight_dtype=torch.float32, channels_last=False, _parts={})
        fresh.pipeline(denoiser).save_pretrained(folder)


def encode_alone(
    encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """`encode(rows)` on the device, where what becomes of a row does not depend on the others, nor on how many there
    are: libraries choose kernels by the shape, and each rounds in its own way. So a CPU, which is hardly slower then,
    encodes each row alone, and a GPU always as many, copies filling the last lot up. Equal rows are encoded once."""
    distinct, places = torch.unique(rows, dim=0, return_inverse=True)
    at_once = 1 if device.type == "cpu" else ENCODED_AT_ONCE
    filled = distinct[torch.arange(-(-len(distinct) // at_once) * at_once) % len(distinct)]
    return torch.cat([encode(part) for part in to_device(filled, device).split(at_once)])[to_device(places, device)]


def as_json(value: Any) -> Any:
    """A value of a config as it is read back: tuples are lists."""
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def part_class(model_index: dict[str, Any], name: str) -> type:
    """The class of a part, which model_index.json names. Raises ValueError if it is not of diffusers or
    transformers."""
    library, class_name = model_index.get(name) or (None, None)
    found = library in ("diffusers", "transformers") and getattr(importlib.import_module(library), class_name, None)
    if not found:
        raise ValueError(f"model_index.json: no such class of diffusers or transformers: {class_name} of {library}")
    return found


def load_part(source: str, model_index: dict[str, Any], name: str, method: str = "from_pretrained", **kwargs) -> Any:
    """Load a part of a checkpoint by its class's `method`. Raises InputError if that fails."""
    with blame_part(source, name):
        return getattr(part_class(model_index, name), method)(source, subfolder=name, **kwargs)


def load_weights(source: str, model_index: dict[str, Any], name: str, **kwargs) -> torch.nn.Module:
    """Load a part that has weights, all of them: a library would draw those that are not in the file at random.

    Raises:
        InputError: the part cannot be loaded, weights are missing, too many or of another shape, or one is not finite.
    """
    part, found = load_part(source, model_index, name, output_loading_info=True, **kwargs)
    unexpected = [key for key in found["unexpected_keys"] if not key.endswith("position_ids")]  # of older CLIP files
    problems = {"missing": found["missing_keys"], "not of this model": unexpected, "of another shape": []}
    problems["of another shape"] = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    loaded = {key: value for key, value in part.state_dict().items() if not value.is_meta}  # as what is missing is
    problems["not finite"] = [key for key, value in loaded.items() if not value.isfinite().all()]
    for what, keys in problems.items():
        if keys:
            named = some(sorted(keys))
            raise InputError(f"model.pretrained_model_name_or_path: {source}: {name}: weights {what}: {named}")
    return part


def blame_part(source: str, name: str) -> AbstractContextManager[None]:
    """Turn what goes wrong with a part of a checkpoint into an InputError that names it."""
    culprit = f"model.pretrained_model_name_or_path: {source}: {name}"
    return blame(culprit, *LOAD_ERRORS)
