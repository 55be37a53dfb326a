"""What all families of checkpoints in diffusers' format have in common."""

import contextlib
import dataclasses
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from huggingface_hub import hf_hub_download
from PIL import Image

from difftrain_utils.config.config import Config
from difftrain_utils.config.few_step import FewStepConfig, pipeline_guidance
from difftrain_utils.config.model import LoraConfig
from difftrain_utils.config.training import TrainConfig
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import LOAD_ERRORS, InputError, RunError, blame, not_installed, some
from difftrain_utils.families.family import Conditioning, Weights
from difftrain_utils.families.lora import base_state, has_adapters, save_adapters, with_trained
from difftrain_utils.families.samplers import build_schedule, few_step_sampler
from difftrain_utils.families.text_encoders import TextEncoders
from difftrain_utils.files import file_digest, part_digest, tensors_digest
from difftrain_utils.keyed_random import keyed_randn, seed_for
from difftrain_utils.objective.schedule import Schedule
from difftrain_utils.optimization.sharding import is_sharded, shard_encoder
from difftrain_utils.optimization.trained import is_trained_whole
from difftrain_utils.processes import largest_of_all

ENCODED_AT_ONCE = 16  # captions on a GPU
WITHOUT_WEIGHTS = ("tokenizer", "image_processor")  # beginnings of the names of parts that have none
DESCRIBING = (".json", ".txt", ".model", ".jinja")  # endings of configs, vocabularies and templates of chats
GUIDANCE = 1.0  # that a guidance-distilled model is told in training: that of an image as it is
GUIDANCE_OPTIONS = ("guidance_scale", "true_cfg_scale", "negative_prompt")  # as pipelines call them
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
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
    pipeline consists, and how captions are encoded (`encode_texts`) and the denoiser is called (`predict`).

    Frozen parts are loaded when they are first used (`part`).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_part: ClassVar[str] = "transformer"
    image_part: ClassVar[str | None] = "vae"
    content: ClassVar[str] = "pixel_values"
    """What of a batch the part that encodes images is given."""
    text_parts: ClassVar[tuple[str, ...]] = ()
    condition_parts: ClassVar[tuple[str, ...]] = ()
    """The parts besides that encode what the denoiser is told of images, where the checkpoint has them."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    """The ends of the names of the denoiser's layers that adapters are for (`model.lora`): the attention's."""
    float32_parts: ClassVar[tuple[str, ...]] = ()
    """The frozen parts that stay in float32 in all precisions."""
    text_lengths: ClassVar[tuple[int, float]] = (1, math.inf)
    """The fewest and the most tokens that `text_length` may be."""
    trained_text_parts: ClassVar[tuple[str, ...]] = ()
    """The text encoders that `model.train_text_encoder` trains, where it can be."""
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS
    """The fields of a denoiser's config in which it may differ from the checkpoint's: they say what is within it, and
    all others what goes in and out."""
    takes_gradient_checkpointing: ClassVar[bool] = True
    """Whether `train.gradient_checkpointing` leaves what the denoiser computes as it is."""
    has_init_noise_sigma: ClassVar[bool] = False
    """Whether the pipeline asks its sampler for `init_noise_sigma`, which the flow matching ones have not."""
    gives_sigmas: ClassVar[bool] = False
    """Whether the pipeline tells its sampler at which sigmas to sample, and a shift of them; few samplers take that."""
    tells_tokens: ClassVar[bool] = False
    """Whether the pipeline tells its sampler a shift by the number of the image's tokens, from the sampler's config."""
    guidance_order: ClassVar[Literal["nothing first", "prompt first", "apart"] | None] = None
    """How the pipeline asks for the two predictions of classifier-free guidance: in one call, in this order, or in two,
    that of the prompt first; None: it does not guide, or this is not known."""
    converts_itself: ClassVar[bool] = False
    """Whether the pipeline gives its sampler a velocity, whatever the denoiser predicts, which is always the same."""
    noise_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """From which noise level to which the pipeline asks the denoiser, as fractions of the schedule."""
    has_fixed_size: ClassVar[bool] = False
    """Whether the pipeline makes images of one size alone, that of the denoiser's `sample_size`."""
    gap_fields: ClassVar[dict[str, Any]] = {}
    """The fields of a denoiser's config with which it can be told how far a step goes; none: it cannot."""

    source: str
    """The folder or hub name of the checkpoint, at `revision` and `variant`."""
    revision: str | None
    variant: str | None
    model_index: dict[str, Any]
    """The content of its model_index.json."""
    schedule: Schedule
    sampler: SchedulerMixin
    """Of the same schedule, for pipelines."""
    name: str = ""
    """What the config calls it, which of a built-in one is not its folder."""
    init_seed: int | None = None
    """The seed of the denoiser's random weights; None: the checkpoint's weights."""
    has_weights: bool = True
    """False: all parts are on the meta device, and of the checkpoint only configs and tokenizers are read."""
    max_sequence_length: int | None = None
    """Tokens that captions are cut and padded to; None: the pipeline's own default."""
    guidance: float = GUIDANCE
    """What a denoiser with an embedding of guidance is told."""
    tells_gap: bool = False
    """Whether the denoiser is told how far a step goes (`train_few_step.py`)."""
    lora: LoraConfig | None = None
    """Of the adapters that the denoiser has in training."""
    offload_text_encoders: bool = False
    """Leave the text encoders' weights on the disk."""
    vae_slicing: bool = False
    vae_tiling: bool = False
    channels_last: bool = False
    """The VAE's; see `train.channels_last`."""
    shares_encoders: bool = False
    """Whether the processes share the text encoders' weights out; see `train.shard_encoders`."""
    cached: tuple[str, ...] = ()
    """The frozen parts that training does without: their work is cached."""
    text_encoders: TextEncoders | None = None
    device: torch.device | str = "cpu"
    weight_dtype: torch.dtype = torch.float32
    _parts: dict[str, Any] = field(default_factory=dict, repr=False)
    _configs: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "DiffusersFamily":
        """Load what is frozen, but for the parts whose work is cached. Raises InputError if a part cannot be loaded."""
        revision, data = config.model.revision, config.data
        own = load_part(source, model_index, "scheduler", revision=revision)
        if not isinstance(own, SchedulerMixin):
            raise ValueError(f"scheduler: a {type(own).__name__} is no scheduler")
        schedule, sampler = cls.build_schedule(type(own), own.config, config)
        if isinstance(config, FewStepConfig):
            sampler = few_step_sampler(schedule, sampler, config)
            cls._check_few_step(config)
        cls._check_fields(config, sampler)
        encoders = [part for part in cls.text_parts if not part.startswith(WITHOUT_WEIGHTS)]
        cached = (cls.image_part, *cls.condition_parts) if data.cache_latents and cls.image_part else ()
        family = cls(
            source,
            revision,
            config.model.variant,
            model_index,
            schedule,
            sampler,
            name=config.model.pretrained_model_name_or_path,
            init_seed=config.train.seed_of("weights") if weights == "random" else None,
            has_weights=weights != "none",
            max_sequence_length=config.model.max_sequence_length,
            guidance=GUIDANCE if config.model.guidance is None else config.model.guidance,
            tells_gap=config.tells_gap,
            lora=config.model.lora,
            offload_text_encoders=config.model.offload_text_encoders,
            vae_slicing=config.model.vae_slicing,
            vae_tiling=config.model.vae_tiling,
            channels_last=config.train.channels_last,
            cached=(*cached, *(encoders if data.cache_text else ())),
        )
        family.check_text_length()
        if family.vae_slicing or family.vae_tiling:
            family._cut_up(family._on_meta(cls.image_part))
        if config.model.guidance is not None and not family.has_guidance_embedding:
            raise InputError(
                f"model.guidance: the {family.denoiser_part} of {family.name} has no embedding of guidance"
            )
        if cls.image_part:
            factor = family.config_of(cls.image_part).get("scaling_factor", 1.0)
            with blame_part(source, cls.image_part):
                if not isinstance(factor, int | float) or not math.isfinite(factor) or factor == 0:
                    raise ValueError(f"scaling_factor must be a number other than 0, got {factor!r}")
        for part in family.frozen_parts:
            if part not in family.cached:
                family.part(part)
        return family

    @classmethod
    def build_schedule(
        cls, sampler_class: type[SchedulerMixin], own: dict[str, Any], config: Config
    ) -> tuple[Schedule, SchedulerMixin]:
        """The schedule to train with, and a sampler of it; `own` is the config of the checkpoint's, of this class.
        Raises InputError, or ValueError about the checkpoint, if there is none."""
        return build_schedule(sampler_class, own, config, cls.has_init_noise_sigma, cls.gives_sigmas)

    @classmethod
    def _check_fields(cls, config: Config, sampler: SchedulerMixin) -> None:
        """Raise InputError for what this pipeline has not, or does not do."""
        name, lora = cls.pipeline_class.__name__, config.model.lora
        known = inspect.signature(cls.pipeline_class.__call__).parameters
        for section, option in (("evaluation", "guidance_rescale"), ("model", "max_sequence_length")):
            value = getattr(getattr(config, section), option)
            if value and option not in known:
                raise InputError(f"{section}.{option}: a {name} has none, got {value}")
        if cls.gives_sigmas and not {"sigmas", "mu"} <= inspect.signature(sampler.set_timesteps).parameters.keys():
            raise InputError(
                f"scheduler.sampler: a {name} gives its sampler sigmas and a shift, which {type(sampler).__name__} "
                "does not take; try FlowMatchEulerDiscreteScheduler"
            )
        if config.scheduler.flow_shift_by_tokens and not cls.tells_tokens:
            raise InputError(f"scheduler.flow_shift_by_tokens: a {name} does not tell its sampler how many there are")
        needed = {"vae_slicing": cls.image_part, "vae_tiling": cls.image_part, "offload_text_encoders": cls.text_parts}
        for option, parts in needed.items():
            if getattr(config.model, option) and not parts:
                raise InputError(f"model.{option}: a {name} has no such part, got true")
        if config.model.train_text_encoder and not cls.trained_text_parts:
            raise InputError(f"model.train_text_encoder: the text encoders of a {name} stay frozen, got true")
        if lora is not None and not lora.merge and not cls.loads_adapters():
            raise InputError(f"model.lora: a {name} of diffusers loads no adapters; use model.lora.merge")

    @classmethod
    def _check_few_step(cls, config: FewStepConfig) -> None:
        """Raise InputError if this pipeline cannot sample what the method trains."""
        name, method, steps = cls.pipeline_class.__name__, config.few_step.method, config.evaluation.num_inference_steps
        if config.tells_gap and not cls.gap_fields:
            raise InputError(
                f"few_step.method: a {name} cannot tell its denoiser how far a step goes; use consistency, got {method}"
            )
        if not config.tells_gap and steps > 1 and not hasattr(cls.pipeline_class, "prepare_extra_step_kwargs"):
            raise InputError(
                f"evaluation.num_inference_steps: must be 1 for consistency, a {name} gives its sampler no generator "
                f"for the noise between steps, got {steps}"
            )

    @property
    def class_name(self) -> str:
        return self.pipeline_class.__name__

    # ── The parts ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """The names of all parts but the denoiser and the sampler that the checkpoint has."""
        names = (*((self.image_part,) if self.image_part else ()), *self.text_parts, *self.condition_parts)
        return tuple(name for name in names if self.has_part(name))

    def has_part(self, name: str) -> bool:
        """Whether the checkpoint has this part: model_index.json says null of one that was left out."""
        return any(self.model_index.get(name) or ())

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the denoiser is told a guidance, because it was distilled with one."""
        return bool(self.config_of(self.denoiser_part).get("guidance_embeds"))

    @property
    def is_distilled(self) -> bool:
        """Whether the pipeline's guidance scale is not that of classifier-free guidance: the denoiser is told it, or it
        is not used."""
        has_embedding = self.config_of(self.denoiser_part).get("time_cond_proj_dim") is not None
        return self.has_guidance_embedding or has_embedding or bool(self.pipeline_options.get("is_distilled"))

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
        if name.startswith(WITHOUT_WEIGHTS):
            return load_part(self.source, self.model_index, name, **at)
        if not self.has_weights:
            return self._on_meta(name)
        at["variant"] = self.variant  # and at once in the run's precision: a large encoder would fill main memory twice
        at["dtype" if self.model_index[name][0] == "transformers" else "torch_dtype"] = self.dtype_of(name)
        is_offloaded = self.offload_text_encoders and name in self.text_parts
        if is_offloaded:
            at["device_map"] = {"": "disk"}
        part = load_weights(self.source, self.model_index, name, **at).eval().requires_grad_(False)
        if is_offloaded:
            return compute_on(part, self.device)
        if name == self.image_part:
            self._cut_up(part)
            if self.channels_last:
                torch.nn.Module.to(part, memory_format=torch.channels_last)
        return move_part(part, self.device, self.dtype_of(name))

    def _cut_up(self, vae: torch.nn.Module) -> None:
        """Let it compute as `model.vae_slicing` and `model.vae_tiling` say. Raises InputError if it cannot."""
        for option, switch in (("vae_slicing", "use_slicing"), ("vae_tiling", "use_tiling")):
            if getattr(self, option) and not hasattr(vae, switch):
                raise InputError(f"model.{option}: the VAE of {self.name}, {type(vae).__name__}, has none, got true")
            setattr(vae, switch, getattr(self, option))

    def dtype_of(self, name: str) -> torch.dtype:
        """That a frozen part has on the device."""
        return torch.float32 if name in self.float32_parts else self.weight_dtype

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. Random weights are a function of the seed."""
        if not self.has_weights:
            return self.denoiser_on_meta()
        name, at = self.denoiser_part, {"revision": self.revision}
        if self.init_seed is None:
            denoiser = load_weights(self.source, self.model_index, name, variant=self.variant, **at)
            return self._with_gap(denoiser) if self.tells_gap else denoiser
        config = load_part(self.source, self.model_index, name, "load_config", **at) | self._more_fields(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.init_seed, "weights", 0))
            return part_class(self.model_index, name).from_config(config)

    def _more_fields(self, name: str) -> dict[str, Any]:
        """The fields of a part's config that are not the checkpoint's: of a denoiser that has no place for a gap."""
        if not (self.tells_gap and name == self.denoiser_part):
            return {}
        at = {"revision": self.revision}
        own = load_part(self.source, self.model_index, name, "load_config", **at)
        return {field: value for field, value in self.gap_fields.items() if not own.get(field)}

    def _with_gap(self, denoiser: torch.nn.Module) -> torch.nn.Module:
        """The same function as the denoiser, with a place for a gap, of which what it puts out is 0 at first."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            told = type(denoiser).from_config(self.config_of(self.denoiser_part))
        missing = told.load_state_dict(denoiser.state_dict(), strict=False).missing_keys
        last = missing[-1].rpartition(".")[0] if missing else None
        for name, weight in told.named_parameters():
            if name.rpartition(".")[0] == last:
                torch.nn.init.zeros_(weight)
        return told

    def denoiser_on_meta(self) -> torch.nn.Module:
        """A denoiser without weights, for what only looks at its config."""
        with torch.device("meta"):
            return part_class(self.model_index, self.denoiser_part).from_config(self.config_of(self.denoiser_part))

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        names = [name for name in self.frozen_parts if name not in self.trained_parts]
        return {name: self.part(name) for name in names if not name.startswith(WITHOUT_WEIGHTS)}

    def _on_meta(self, name: str) -> torch.nn.Module:
        """A frozen part without weights."""
        cls, config = part_class(self.model_index, name), self.config_of(name)
        with torch.device("meta"):
            part = cls(config) if self.model_index[name][0] == "transformers" else cls.from_config(config)
        return part.eval().requires_grad_(False)

    def of_shapes(self, dtype: torch.dtype, empty: Callable[[torch.nn.Module], torch.nn.Module]) -> "DiffusersFamily":
        """See `Family`. Tokenizers are as they were; the VAE does not slice and tile, which changes no shape."""
        family = dataclasses.replace(self, device="cpu", weight_dtype=dtype, cached=(), _parts={})
        for name in self.frozen_parts:
            if name.startswith(WITHOUT_WEIGHTS):
                family._parts[name] = self.part(name)
            else:
                family._parts[name] = empty(move_part(self._on_meta(name), "meta", family.dtype_of(name)))
        return family

    def config_of(self, name: str) -> Any:
        """The config of a part with its defaults, without its weights."""
        if name not in self._configs:
            cls, at = part_class(self.model_index, name), {"subfolder": name, "revision": self.revision}
            with blame_part(self.source, name):
                if self.model_index[name][0] == "transformers":
                    self._configs[name] = cls.config_class.from_pretrained(self.source, **at)
                else:
                    config = cls.load_config(self.source, **at) | self._more_fields(name)
                    with torch.device("meta"):
                        self._configs[name] = cls.from_config(config).config
        return self._configs[name]

    def train_text_encoders(self, seed: int, gradient_checkpointing: bool) -> TextEncoders:
        parts = {name: self.part(name) for name in self.trained_text_parts}
        self.text_encoders = TextEncoders(parts, self.encode_prompts, self.lora, seed, gradient_checkpointing).train()
        return self.text_encoders

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The names of the parts besides the denoiser that are trained."""
        return () if self.text_encoders is None else self.trained_text_parts

    def move_frozen_parts(self, accelerator: Accelerator, config: TrainConfig) -> None:
        """Those that are loaded, and those that will be; but encoders that are shared out (`train.shard_encoders`) are
        loaded here."""
        self.free_cached()  # an offloaded one cannot be moved
        self.weight_dtype = weight_dtype(accelerator.mixed_precision)
        self.shares_encoders = config.shard_encoders and is_sharded(config, accelerator.num_processes)
        for name in self.text_parts if self.shares_encoders else ():
            part = self.part(name) if self.has_part(name) else None
            if isinstance(part, torch.nn.Module):
                shard_encoder(move_part(part, "cpu", self.weight_dtype), accelerator, config)
        self.device = accelerator.device
        for name, part in self._parts.items():
            is_moved = name in self.trained_parts or (self.shares_encoders and name in self.text_parts)
            if isinstance(part, torch.nn.Module) and not is_moved:
                move_part(part, self.device, self.dtype_of(name))

    def free_cached(self) -> None:
        for part in self.cached:
            self._parts.pop(part, None)

    # ── What they are, as digests ────────────────────────────────────────────────────────────────────────────
    def digests(self, denoiser: torch.nn.Module) -> dict[str, str]:
        """See `Family`; without loading the encoders. Raises InputError if weights are missing or damaged."""
        encoders = [part for part in self.frozen_parts if not part.startswith(WITHOUT_WEIGHTS)]
        return {self.denoiser_part: tensors_digest(base_state(denoiser))} | {
            part: self._digest(part) for part in encoders
        }

    def describe_parts(self, *parts: str) -> dict[str, str]:
        described = {} if self.max_sequence_length is None else {"max_sequence_length": str(self.max_sequence_length)}
        for part in filter(self.has_part, parts):
            files = sorted(path for path in self._folder(part).iterdir() if path.suffix in DESCRIBING)
            described |= {f"{part}/{path.name}": file_digest(path) for path in files}
            described |= {part: self._digest(part)} if not part.startswith(WITHOUT_WEIGHTS) else {}
        return described

    def _digest(self, part: str) -> str:
        with blame_part(self.source, part):
            return part_digest(self._folder(part), self.variant)

    def _folder(self, part: str) -> Path:
        folder = Path(self.source)
        if not folder.is_dir():  # a hub name, of which all that was loaded lies in one folder of the hub's cache
            folder = Path(hf_hub_download(self.source, "model_index.json", revision=self.revision)).parent
        has_weights = any(path.suffix in (".safetensors", ".bin") for path in (folder / part).glob("*"))
        if not part.startswith(WITHOUT_WEIGHTS) and not has_weights:
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
        got = height if height == width else f"{height} x {width}"
        if self.has_fixed_size:
            size = self.config_of(self.denoiser_part).sample_size
            sides = [side * self.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size)]
            if [height, width] != sides:
                needed = " x ".join(map(str, sides))
                raise InputError(f"{name}: {self.name} makes images of {needed} alone, got {got}")
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            raise InputError(f"{name}: {self.name} needs a multiple of {multiple}, got {got}")

    @property
    def tile_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the largest tile of `model.vae_tiling`; None of a VAE without."""
        vae = self._on_meta(self.image_part) if self.image_part else None
        if hasattr(vae, "tile_sample_min_height"):
            return vae.tile_sample_min_height, vae.tile_sample_min_width
        side = getattr(vae, "tile_sample_min_size", None)
        return None if side is None else (side, side)

    def check_text_length(self) -> None:
        """Raise InputError unless `text_length`, where the pipeline has one, is of `text_lengths`."""
        (least, most), name = self.text_lengths, self.pipeline_class.__name__
        has_length = "max_sequence_length" in inspect.signature(self.pipeline_class.__call__).parameters
        if has_length and not least <= self.text_length <= most:
            rule = f"must be {least}" if least == most else f"must be from {least} to {most}"
            raise InputError(f"model.max_sequence_length: {rule} for this {name}, got {self.text_length}")

    def check_captions(self, captions: Iterable[str], field: str = "data.caption_column") -> None:
        """See `Family`: any text is one."""

    def check_clip(self, tokenizer: str, text_encoder: str) -> None:
        """Raise ValueError unless these two parts, a tokenizer and a text encoder of CLIP, are of each other."""
        config, vocabulary = self.config_of(text_encoder), self.part(tokenizer)
        if len(vocabulary) != config.vocab_size:  # transformers makes an empty one where files are missing
            raise ValueError(f"{tokenizer} has {len(vocabulary)} tokens, {text_encoder} {config.vocab_size}")
        limit, positions = vocabulary.model_max_length, config.max_position_embeddings
        if not 2 <= limit <= positions:
            raise ValueError(f"{tokenizer} cuts captions at {limit} tokens, {text_encoder} takes {positions}")

    # ── Images and captions ──────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The moments of the VAE's posterior: (batch, 2, channels, height, width); in pixel space the images
        themselves and 0."""
        if self.image_part is None:
            return torch.stack([pixel_values, torch.zeros_like(pixel_values)], 1)
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
                latents.new_tensor(config[name]).view(-1, *[1] * (latents.ndim - 2))
                for name in ("latents_mean", "latents_std")
            )
            latents = (latents - mean) / std
        if config.get("shift_factor"):
            latents = latents - config.shift_factor
        return latents * config.get("scaling_factor", 1.0)

    def refuse_shift(self) -> None:
        """Raise ValueError if the VAE has a `shift_factor`, for families whose pipeline does not undo it."""
        if shift := self.config_of("vae").get("shift_factor"):
            name = self.pipeline_class.__name__
            raise ValueError(f"vae has a shift_factor, {shift}, which a {name} does not undo")

    def encode_prompts(self, captions: Sequence[str | None]) -> Conditioning:
        """See `Family`. Libraries choose kernels by the shape, and each rounds in its own way. So a CPU, which is
        hardly slower then, encodes each caption alone, and a GPU always as many, copies filling the last lot up; equal
        ones are encoded once, and none by itself."""
        texts = list(dict.fromkeys(caption for caption in captions if caption is not None))
        at_once, encoded = 1 if torch.device(self.device).type == "cpu" else ENCODED_AT_ONCE, {}
        num_lots, has_none = -(-len(texts) // at_once), None in captions
        if self.shares_encoders:  # all processes take part in each of their passes
            num_lots, has_none = largest_of_all(num_lots, has_none, device=self.device)
        for number in range(num_lots):
            lot = texts[number * at_once : (number + 1) * at_once]
            with quiet():
                values = self.encode_texts(((lot or [""]) * at_once)[:at_once])
            encoded |= {text: {name: value[i] for name, value in values.items()} for i, text in enumerate(lot)}
        if has_none:
            with quiet():
                encoded[None] = {name: value[0] for name, value in self.encode_nothing().items()}
        rows = [encoded[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def encode_texts(self, texts: list[str]) -> Conditioning:
        """The conditioning of texts, as their pipeline encodes them together."""
        raise NotImplementedError

    def encode_nothing(self) -> Conditioning:
        """The pipeline's own conditioning of no caption, of one sample; that of the empty one, as a rule."""
        return self.encode_texts([""])

    def null_conditioning(self) -> Conditioning:
        return self.encode_prompts([None])

    def encode(
        self,
        batch: dict[str, Any],
        seed: int,
        text_encoders: torch.nn.Module | None = None,
        purpose: str = "vae_noise",
    ) -> tuple[torch.Tensor, Conditioning]:
        moments = batch["moments"] if "moments" in batch else self.encode_images(batch[self.content])
        noise = keyed_randn(seed, purpose, batch["keys"], moments.shape[2:], moments.device)
        encode_prompts = text_encoders or self.encode_prompts
        conditioning = batch["conditioning"] if "conditioning" in batch else encode_prompts(batch["captions"])
        return self.sample_latents(moments, noise), conditioning

    def shift(self, *size: int) -> float:
        """That of the schedule, for all sizes, or where the sampler's is dynamic, what its pipeline makes of the size:
        exp(μ), or μ if `time_shift_type` is linear."""
        config = self.sampler.config
        if not config.get("use_dynamic_shifting"):
            return self.schedule.shift
        mu = self.mu(*size)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def mu(self, *size: int) -> float:
        """What a dynamic sampler is told of latents of this size: linear in their number of tokens (Flux's)."""
        config, names = self.sampler.config, ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(self.num_tokens(*size), *(config[name] for name in names))

    def num_tokens(self, *size: int) -> int:
        """Into how many tokens the denoiser cuts latents of this size."""
        return math.prod(side // self.patch_size for side in size)

    @property
    def patch_size(self) -> int:
        """The side of the denoiser's tokens in latents; of a UNet, what it can halve as often as it does."""
        config = self.config_of(self.denoiser_part)
        return config.get("patch_size") or 2 ** (len(config.block_out_channels) - 1)

    @property
    def vae_scale_factor(self) -> int:
        """How much smaller latents are than images."""
        return 2 ** (len(self.config_of(self.image_part).block_out_channels) - 1) if self.image_part else 1

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * self.patch_size

    # ── Pipelines ────────────────────────────────────────────────────────────────────────────────────────────
    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        pipeline = self._pipeline_of(self.frozen_parts, denoiser)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def text_pipeline(self) -> DiffusionPipeline:
        """A pipeline of the parts that encode captions alone, for its own `encode_prompt`."""
        return self._pipeline_of([name for name in self.text_parts if self.has_part(name)], None)

    def _pipeline_of(self, names: Sequence[str], denoiser: torch.nn.Module | None) -> DiffusionPipeline:
        parts = dict.fromkeys([*([self.image_part] if self.image_part else []), *self.text_parts])
        parts |= dict.fromkeys(self.condition_parts)
        parts |= {name: self.part(name) for name in names} | {self.denoiser_part: denoiser}
        cls = self.on_device(self.pipeline_class)
        return cls(**parts, scheduler=self.sampler, **self.pipeline_options)

    def on_device(self, cls: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
        """A class of pipelines that computes on the family's device: with `offload_text_encoders` it would take that of
        their weights, which they have not, for its own."""
        if not self.offload_text_encoders:
            return cls
        return type(cls.__name__, (cls,), {"device": torch.device(self.device)})

    @property
    def text_options(self) -> dict[str, Any]:
        """What `encode_prompt` and the pipeline are told of captions besides their text."""
        return {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}

    @property
    def text_length(self) -> int:
        """Tokens that captions are cut and padded to: `max_sequence_length`, or what a call of the pipeline has by
        default, which is not always that of its `encode_prompt`."""
        default = inspect.signature(self.pipeline_class.__call__).parameters["max_sequence_length"].default
        return default if self.max_sequence_length is None else self.max_sequence_length

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """What a call of the pipeline is told of its prompts and their guidance."""
        return {"prompt": prompts, "guidance_scale": guidance_scale}

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
        pipeline = self.pipeline(denoiser)
        options = self.picture_options(
            pipeline, list(prompts), height, width, num_inference_steps, guidance_scale, guidance_rescale
        )
        return pipeline(**options, generator=list(generators)).images

    def picture_options(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompts: list[str] | None = None,
    ) -> dict[str, Any]:
        """What a call of the pipeline is told; of what is None, its own default holds. A size that it does not ask for
        is left out."""
        known = inspect.signature(type(pipeline).__call__).parameters
        options = {"height": height, "width": width, "use_resolution_binning": False}
        options = {name: value for name, value in options.items() if name in known and value is not None}
        if self.tells_gap:
            steps = num_inference_steps or known["num_inference_steps"].default
            guidance_scale = pipeline_guidance("mean_flow", self.class_name, steps)
        call = self.call_options(prompts, 1.0 if guidance_scale is None else guidance_scale)
        if guidance_scale is None:
            call = {name: value for name, value in call.items() if name not in GUIDANCE_OPTIONS}
        more = {"guidance_rescale": guidance_rescale or None, "num_inference_steps": num_inference_steps}
        more |= {"negative_prompt": negative_prompts}
        return options | self.text_options | call | {name: value for name, value in more.items() if value is not None}

    def embed_gap(self, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor | None:
        """The `timestep_cond` of a UNet that is told how far a step goes, (batch, time_cond_proj_dim), else None: the
        conditioning's "gap", or 0 without one, embedded as the pipelines' `get_guidance_scale_embedding` does with
        guidance_scale - 1."""
        if not self.tells_gap:
            return None
        gap = conditioning.get("gap", torch.zeros(timesteps.shape, device=timesteps.device))
        return get_timestep_embedding(1000 * gap, self.config_of("unet").time_cond_proj_dim, downscale_freq_shift=1)

    def save_pipeline(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`: the frozen parts in float32 and unused (a tokenizer that has padded would be saved with its
        padding); so are frozen weights of the denoiser, around which what was trained is put, adapters merged."""
        self.check_denoiser(denoiser)
        if has_adapters(denoiser) or not is_trained_whole(denoiser):
            denoiser = with_trained(self.load_denoiser(), denoiser)
        plain = {"weight_dtype": torch.float32, "channels_last": False, "offload_text_encoders": False}
        plain["shares_encoders"] = False
        fresh = dataclasses.replace(self, device="cpu", text_encoders=None, _parts={}, **plain)
        for name in self.trained_parts:
            with_trained(fresh.part(name), self.part(name))
        fresh.pipeline(denoiser).save_pretrained(folder)

    @classmethod
    def loads_adapters(cls) -> bool:
        """Whether plain diffusers loads adapters into a pipeline of this class."""
        return hasattr(cls.pipeline_class, "save_lora_weights")

    def save_lora(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`."""
        self.check_denoiser(denoiser)
        save_adapters(folder, {self.denoiser_part: denoiser} | {name: self.part(name) for name in self.trained_parts})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a warning for each caption that is longer than the model takes."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def move_part(part: torch.nn.Module, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """Bring a part onto the device and into `dtype`, as `from_pretrained` does: what is not saved, such as the
    frequencies of rotary embeddings, stays as it is, and so does in fp16 what would overflow, as in T5."""
    kept = set(getattr(part, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for name, tensor in part.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return torch.nn.Module.to(part, device)  # diffusers' own warns of an empty list of modules


def compute_on(part: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """Let a part whose weights are on the disk compute on the device, where accelerate's own choice would be the CPU;
    what is not saved is there for good."""
    for module in part.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = device
    for buffer in part.buffers():
        if not buffer.is_meta:
            buffer.data = buffer.data.to(device)
    return part


def caption_start(tokenizer: Any, **template: Any) -> int:
    """How many tokens a chat's template, of these options, has before a caption."""
    chats = [[{"role": "user", "content": text}] for text in ("a", "b")]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True, **template) for c in chats]
    pairs = zip(*(tokenizer(text).input_ids for text in texts), strict=False)
    return next(number for number, (a, b) in enumerate(pairs) if a != b)


def as_json(value: Any) -> Any:
    """A value of a config as it is read back: tuples are lists."""
    return [as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def part_class(model_index: dict[str, Any], name: str) -> type:
    """The class of a part, which model_index.json names. Raises ValueError if it is not of diffusers or
    transformers."""
    library, class_name = model_index.get(name) or (None, None)
    if class_name is None:
        raise ValueError("model_index.json names no such part")
    if library in dir(diffusers.pipelines):  # where diffusers looks for what one pipeline alone has
        library = "diffusers"
    found = library in ("diffusers", "transformers") and getattr(importlib.import_module(library), class_name, None)
    if not found:
        raise ValueError(f"model_index.json: no such class of diffusers or transformers: {class_name} of {library}")
    return found


def load_part(source: str, model_index: dict[str, Any], name: str, method: str = "from_pretrained", **kwargs) -> Any:
    """Load a part of a checkpoint by its class's `method`. Raises InputError if that fails."""
    with blame_part(source, name):
        try:
            return getattr(part_class(model_index, name), method)(source, subfolder=name, **kwargs)
        except (ImportError, ValueError) as error:
            if "`tiktoken`" in str(error) or "`sentencepiece`" in str(error):  # transformers names either
                raise ValueError(not_installed("sentencepiece")) from error
            if "`pip install torchsde`" in str(error):
                raise ValueError(not_installed("torchsde")) from error
            raise


def load_weights(source: str, model_index: dict[str, Any], name: str, **kwargs) -> torch.nn.Module:
    """Load a part that has weights, all of them: a library would draw those that are not in the file at random.

    Raises:
        InputError: the part cannot be loaded, weights are missing, too many or of another shape, or one is not finite.
    """
    part, found = load_part(source, model_index, name, output_loading_info=True, **kwargs)
    found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not key.endswith("position_ids")]  # old CLIP
    refuse_incomplete(part, found, f"model.pretrained_model_name_or_path: {source}: {name}")
    return part


def refuse_incomplete(part: torch.nn.Module, found: dict[str, Any], culprit: str) -> None:
    """Raise InputError about the `culprit` if weights are missing, too many or of another shape, as a library's
    `output_loading_info` says, or if one is not finite."""
    problems = {"missing": found["missing_keys"], "not of this model": found["unexpected_keys"]}
    problems["of another shape"] = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    loaded = {key: value for key, value in part.state_dict().items() if not value.is_meta}  # as what is missing is
    problems["not finite"] = [key for key, value in loaded.items() if not value.isfinite().all()]
    for what, keys in problems.items():
        if keys:
            raise InputError(f"{culprit}: weights {what}: {some(sorted(keys))}")


def blame_part(source: str, name: str) -> AbstractContextManager[None]:
    """Turn what goes wrong with a part of a checkpoint into an InputError that names it."""
    culprit = f"model.pretrained_model_name_or_path: {source}: {name}"
    return blame(culprit, *LOAD_ERRORS)
