"""What a training step needs of the device's memory, counted before anything is trained."""

import dataclasses
import importlib.util
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_leaves

from difftrain_utils.config.config import Config
from difftrain_utils.config.model import LoraConfig, TextModelConfig
from difftrain_utils.config.preference import PreferenceConfig
from difftrain_utils.data.encoded import ENTRIES_PER_BATCH
from difftrain_utils.data.load import Data
from difftrain_utils.devices import device_name, weight_dtype
from difftrain_utils.errors import InputError, one_line, shorten
from difftrain_utils.families.family import Conditioning, Family, ImageFamily
from difftrain_utils.families.lora import add_adapters
from difftrain_utils.media.media import media_of
from difftrain_utils.optimization.quantized import frozen_linears, quantized_bytes
from difftrain_utils.optimization.sharding import num_bytes, units_of
from difftrain_utils.optimization.trained import round_frozen, trained_parameters
from difftrain_utils.run.activations import Activations, Shapes, count_activations, peak_bytes, without_values
from difftrain_utils.run.flops import flops_of_shapes, without_checkpointing

MEASURED_AT = 2**16  # elements of the weight that an optimizer's state is measured with
EIGHT_BIT = "bitsandbytes.optim.AdamW8bit"  # or another such class: its states are a quarter of float32


@dataclasses.dataclass
class Memory:
    """Bytes that a training step needs."""

    step: str
    """Which step: of what, and on what."""
    held: dict[str, int]
    """What is held, by its name; "activations" is missing where they cannot be counted."""
    while_caching: int
    """What is held at most before it, while caches are made; 0: there are none."""
    saved: dict[str, int]
    """By options, what each by itself would save."""
    capacity: int | None
    """Of a GPU; None: main memory, which others use, too."""
    uncounted: str | None
    """Why activations cannot be counted."""

    @property
    def total(self) -> int:
        return sum(self.held.values())

    @property
    def is_short(self) -> bool:
        return self.capacity is not None and self.total > self.capacity

    @property
    def summary(self) -> str:
        largest = sorted(((size, name) for name, size in self.held.items() if size), reverse=True)[:3]
        parts = ", ".join(f"{name} {size / 1e9:.2g}" for size, name in largest)
        missing = "" if self.uncounted is None else "; activations cannot be counted"
        of = "" if self.capacity is None else f" of {self.capacity / 1e9:.3g}"
        advice = "; this does not fit: difftrain validate-config says what would" if self.is_short else ""
        return f"{self.total / 1e9:.2g}{of} GB a step (largest: {parts}{missing}){advice}"

    def __str__(self) -> str:
        lines = [f"Memory of a step in 10⁹ bytes: {self.step}"]
        lines += [_row(name, size) for name, size in self.held.items() if size]
        lines.append(_row("sum" if self.uncounted is None else "sum without activations", self.total))
        if self.uncounted is not None:
            lines.append(f"  activations cannot be counted: {self.uncounted}")
        if self.capacity is not None:
            lines.append(_row("of the device", self.capacity))
        if self.is_short:
            lines.append("  it does not fit")
        if self.while_caching:
            lines.append(_row("before it, while caching", self.while_caching))
        if self.saved:
            lines.append("each of these by itself would save:")
            ordered = sorted(self.saved.items(), key=lambda option: -option[1])
            for option, size in ordered:
                is_enough = self.is_short and self.total - size <= self.capacity
                lines.append(_row(option, size) + ("  then it fits" if is_enough else ""))
        return "\n".join(lines)


def price_of(option: str) -> int:
    """0 for an option that leaves what is trained as it is, 1 for what is slow besides, 2 for what trains otherwise."""
    if option.startswith(("an optimizer", "train.precision", "model.lora")):
        return 2
    return int(option.startswith(("train.shard_offload", "ema.on_cpu", "model.vae")))


def _row(name: str, size: int) -> str:
    number = "<0.001" if 0 < size < 1e6 else f"{size / 1e9:.3g}"
    return f"  {name:<40} {number:>8}"


def describe_memory(*run: Any) -> str:
    """The `plan_memory` of a run in words. A plan that fails is no reason to refuse a run."""
    return _unless_it_fails(lambda: str(plan_memory(*run)), "Memory of a step: ")


def summarise_memory(*run: Any) -> str:
    """Its sum and its largest parts, in a line."""
    return _unless_it_fails(lambda: plan_memory(*run, with_savings=False).summary)


def _unless_it_fails(describe: Callable[[], str], what: str = "") -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries', about a step that is not made
            return describe()
    except Exception as error:
        return f"{what}cannot be counted ({shorten(one_line(error), 100)})"


def plan_memory(
    accelerator: Accelerator,
    family,
    models: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    data: Data,
    config: Config,
    with_savings: bool = True,
) -> Memory:
    """What a step of the run that is about to start will need (docs/performance.md says what is counted). No weight is
    touched, and nothing but shapes is computed. Of several buckets the largest counts, and all captions as if they
    filled their length."""
    planner = Planner(accelerator, family, models, optimizer, data, config)
    held = planner.held(config)
    options = planner.that_need_less(config) if with_savings else ()
    saved = {option: sum(held.values()) - total for option, _, total in options}
    is_gpu = accelerator.device.type == "cuda"
    number, size, device = planner.micro_batch(config), planner.describe_size(config), device_name(accelerator.device)
    return Memory(
        f"{number} sample{'s' * (number > 1)} of {size} at a time on {device}",
        held,
        planner.while_caching(config),
        saved,
        torch.cuda.get_device_properties(accelerator.device).total_memory if is_gpu else None,
        planner.uncounted,
    )


class Planner:
    """Counts, for a config and for others that differ from it in the fields of `options` alone."""

    def __init__(
        self,
        accelerator: Accelerator,
        family,
        models: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        data: Data,
        config: Config,
        counted_on: torch.device | None = None,
    ):
        """`counted_on`: the device whose kernels are looked at, where `accelerator.device` is not here."""
        self.accelerator, self.family, self.optimizer, self.data = accelerator, family, optimizer, data
        self.models, self.has_lora, self.seed = models, config.model.lora is not None, config.train.seed_of("noise")
        self.shapes, self.device, self.uncounted = Shapes(), counted_on or accelerator.device, None
        if self.device.type == "cpu":  # with several processes cpu:0, where no tensor that has values is
            self.device = torch.device("cpu")
        self.class_path, self.is_text = config.optimizer.class_path, isinstance(config.model, TextModelConfig)
        self.are_pairs = isinstance(config, PreferenceConfig)
        # each once
        for name in ("_denoiser_of", "_count", "_inputs_of", "_family_of", "_encoding_of"):
            setattr(self, name, cache(getattr(self, name)))

    def held(self, config: Config) -> dict[str, int]:
        """Bytes by what holds them."""
        held = {} if self.is_offloaded(config) else self.shares(config)
        if config.train.shard != "none":
            held["gathered weights"], held["gradients on their way"] = self.gathered(config)
        elif self.accelerator.num_processes > 1:
            held["gradients on their way"] = self.trained_bytes(config)
        for name, size in self.frozen(config, cached=False).items():
            held[name] = math.ceil(size / self.num_shards(config)) if config.train.shard_encoders else size
        if (activations := self.activations(config)) is not None:
            held["activations"] = activations
            held["not at the same time"] = -min(self.growing(config, held), activations // 2)
            if not self.is_text and not config.data.cache_latents:  # before there are any of these
                at_the_end = self.growing(config, held) + activations + held["not at the same time"]
                held["VAE's activations beyond them"] = max(0, self.encoding(config) - at_the_end)
        return held

    def while_caching(self, config: Config) -> int:
        """Bytes held at most while caches are made, one after the other, before there is anything that is trained."""
        if self.is_text:
            return 0
        encoders, others = self.frozen(config, cached=True), sum(self.frozen(config, cached=False).values())
        if not encoders:
            return 0
        of_clips = (self.family.image_part, *self.family.condition_parts)  # which are there at the same time
        for_latents = sum(encoders.pop(name, 0) for name in of_clips)
        return others + max(for_latents and for_latents + self.encoding(config), sum(encoders.values()))

    def growing(self, config: Config, held: dict[str, int]) -> int:
        """Of what is held, the bytes that there are only at the end of the backward pass, when half the activations at
        most are left: gradients, unless those of an earlier part of the batch are there before, and with shares what
        they are sent from. DDP's own memory for them is always there."""
        first = config.train.gradient_accumulation_steps == 1
        names = ["gradients"] * first + ["gradients on their way"] * (config.train.shard != "none")
        return sum(held.get(name, 0) for name in names)

    def shares(self, config: Config) -> dict[str, int]:
        """Of what is trained or trained around: with `train.shard` a process's share of it, which with
        `train.shard_offload` is in main memory."""
        parameters = self.parameters(config)
        frozen = num_bytes(p for p in parameters if not p.requires_grad)
        if config.model.lora is not None and (quantization := config.model.lora.quantization):
            itemsize = self.dtype(config).itemsize
            for model in filter(None, (self.denoiser(config), self.models.get("text_encoders"))):
                for _, layer in frozen_linears(model):
                    frozen += quantized_bytes(layer, quantization) - layer.weight.numel() * itemsize
        trained = self.trained_bytes(config)
        held = {"trained weights": trained, "frozen weights": frozen, "gradients": trained}
        held["optimizer state"] = self.state_bytes(config).total()
        held["averages"] = self.average_bytes(config)
        held["reference"] = self.reference_bytes(config)
        return {name: math.ceil(size / self.num_shards(config)) for name, size in held.items()}

    def trained_bytes(self, config: Config) -> int:
        return num_bytes(p for p in self.parameters(config) if p.requires_grad)

    def average_bytes(self, config: Config, everywhere: bool = False) -> int:
        """Of all averages on the device, or `everywhere`."""
        is_here = everywhere or not config.ema.on_cpu or self.accelerator.device.type == "cpu"
        averaged = num_bytes(trained_parameters(self.denoiser(config), self.models.get("text_encoders")))
        return averaged * ((config.ema.enabled and is_here) + len(config.ema.power_sigma_rels))

    def reference_bytes(self, config: Config) -> int:
        """Of the copy that preferences are compared with: of the weights that are trained; with adapters there is
        none."""
        return self.trained_bytes(config) if self.are_pairs and config.model.lora is None else 0

    def num_shards(self, config: Config) -> int:
        """How many processes share what is trained."""
        is_sharded = config.train.shard != "none"
        return (config.train.shard_size or self.accelerator.num_processes) if is_sharded else 1

    def is_offloaded(self, config: Config) -> bool:
        return config.train.shard != "none" and config.train.shard_offload

    def gathered(self, config: Config) -> tuple[int, int]:
        """With `train.shard`, bytes of the whole weights of a step, in its precision, and of the gradients that are not
        shared out yet. Weights are those of the block that computes, of the next one, which is fetched meanwhile, as if
        these were the two largest, and of what is in no block, or without `train.reshard_after_forward` of all blocks.
        Gradients are those of one block, and what they are sent from, in float32."""
        itemsize, weights, gradients = self.dtype(config).itemsize, 0, [0]
        for model in (self.denoiser(config), *(m for name, m in self.models.items() if name != "denoiser")):
            *blocks, rest = units_of(model)
            sizes = [sum(p.numel() for p in block) for block in blocks]
            weights += sum(p.numel() for p in rest)
            weights += sum(sorted(sizes)[-2:]) if config.train.reshard_after_forward else sum(sizes)
            gradients += [sum(p.numel() for p in unit if p.requires_grad) for unit in (*blocks, rest)]
        return itemsize * weights, (itemsize + 4) * max(gradients)

    def that_need_less(self, config: Config) -> Iterator[tuple[str, Config, int]]:
        """Those of the `options` that the config takes and that save something, each with the bytes then needed."""
        total = sum(self.held(config).values())
        for option, changed in self.options(config):
            try:
                changed.check()
                changed.check_split(self.accelerator.num_processes)
            except InputError:  # it does not go with the others
                continue
            if (needed := sum(self.held(changed).values())) < total:
                yield option, changed, needed

    def way_below(self, config: Config, limit: int) -> list[tuple[str, Config, int]]:
        """Options one on top of the other, each with the bytes then needed, until a step needs `limit` bytes at most or
        there are no more: always the one that saves most, and what is slow or trains otherwise only where nothing else
        is left (`price_of`)."""
        way, total = [], sum(self.held(config).values())
        while total > limit:
            found = sorted(self.that_need_less(config), key=lambda option: (price_of(option[0]), option[2]))
            if not found:
                break
            way.append(found[0])
            _, config, total = found[0]
        return way

    def options(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Configs of the same run that may need less, by what they change."""
        train, data = config.train, config.data

        def change(section: str, **fields: Any) -> Config:
            changed = dataclasses.replace(getattr(config, section), **fields)
            return dataclasses.replace(config, **{section: changed})

        if self.micro_batch(config) % 2 == 0:
            parts = 2 * train.gradient_accumulation_steps
            yield f"train.gradient_accumulation_steps {parts}", change("train", gradient_accumulation_steps=parts)
        if not train.gradient_checkpointing and self.family.takes_gradient_checkpointing:
            yield "train.gradient_checkpointing", change("train", gradient_checkpointing=True)
        if config.optimizer.class_path == self.class_path and train.shard == "none":  # its states cannot be shared out
            yield "an optimizer with 8-bit states", change("optimizer", class_path=EIGHT_BIT)
        if self.accelerator.num_processes > 1 and train.shard == "none" and self.dtype(config) != torch.float16:
            yield "train.shard full", change("train", shard="full")
        if train.shard != "none" and not train.reshard_after_forward:
            yield "train.reshard_after_forward", change("train", reshard_after_forward=True)
        if train.shard != "none" and not train.shard_offload:
            yield "train.shard_offload", change("train", shard_offload=True)
        if train.shard != "none" and not train.shard_encoders and not self.is_text:
            yield "train.shard_encoders", change("train", shard_encoders=True)
        if self.dtype(config) == torch.float32:
            yield "train.precision bf16", change("train", precision="bf16")
        if self.can_have_lora(config):
            merge = not self.family.loads_adapters()
            option = f"model.lora.rank {LoraConfig().rank}" + (" and model.lora.merge" if merge else "")
            yield option, change("model", lora=LoraConfig(merge=merge))
        lora = config.model.lora
        if lora is not None and lora.quantization is None and importlib.util.find_spec("bitsandbytes") is not None:
            for kind in ("int8", "nf4"):
                change_lora = dataclasses.replace(lora, quantization=kind)
                yield f"model.lora.quantization {kind}", change("model", lora=change_lora)
        if not self.is_text and not data.cache_latents and self.family.image_part:
            if not config.model.vae_slicing and self.num_images(config) > 1:
                yield "model.vae_slicing", change("model", vae_slicing=True)
            if not config.model.vae_tiling and self.family.tile_size is not None:
                yield "model.vae_tiling", change("model", vae_tiling=True)
        if config.ema.enabled and not config.ema.on_cpu:
            yield "ema.on_cpu", change("ema", on_cpu=True)
        if not self.is_text and not data.cache_latents:
            needed = {} if getattr(data, "center_crop", True) else {"center_crop": True}
            needed |= {"window": "middle"} if getattr(data, "window", None) == "random" else {}
            said = [f"data.{name}" + ("" if value is True else f" {value}") for name, value in needed.items()]
            yield " and ".join(["data.cache_latents", *said]), change("data", cache_latents=True, **needed)
        if not self.is_text and not data.cache_text:
            yield "data.cache_text", change("data", cache_text=True)

    # ── The run ──────────────────────────────────────────────────────────────────────────────────────────────
    def dtype(self, config: Config) -> torch.dtype:
        """Its precision."""
        return weight_dtype(config.train.precision or self.accelerator.mixed_precision)

    def moments_dtype(self, config: Config) -> torch.dtype:
        """Of what the VAE puts out."""
        return self._family_of(self.dtype(config)).dtype_of(self.family.image_part)

    def micro_batch(self, config: Config) -> int:
        """Samples that a process computes at a time."""
        return config.train.batch_size // (config.train.gradient_accumulation_steps * self.accelerator.num_processes)

    def num_images(self, config: Config) -> int:
        """How many images, or texts, these are: two of a pair."""
        return (2 if self.are_pairs else 1) * self.micro_batch(config)

    def size(self, config: Config) -> tuple[int, ...]:
        """(height, width) of its largest images, (frames, height, width) of videos, (samples,) of sounds, or (length,)
        of its texts in tokens."""
        if self.is_text:
            return (config.data.sequence_length,)
        of_one, buckets = media_of(config.data).size_of(config.data), self.data.buckets
        sizes = [of_one] if buckets is None else buckets.sizes
        return max(sizes, key=math.prod)

    def describe_size(self, config: Config) -> str:
        """The same in words; of sounds in seconds."""
        size = self.size(config)
        if len(size) == 1:
            return f"{size[0]} tokens" if self.is_text else f"{size[0] / config.data.sampling_rate:.3g} s"
        frames = f"{size[0]} frames of " if len(size) == 3 else ""
        return f"{frames}{size[-1]}x{size[-2]}"

    # ── The models ───────────────────────────────────────────────────────────────────────────────────────────
    def denoiser(self, config: Config) -> torch.nn.Module:
        """Its shapes, with the adapters that `model.lora` asks for."""
        return self._denoiser_of(config.model.lora is not None and not self.has_lora, self.dtype(config))

    def _denoiser_of(self, is_adapted: bool, dtype: torch.dtype, is_gathered: bool = False) -> torch.nn.Module:
        """With `is_gathered`, as sharded weights are when they compute."""
        denoiser = without_values(self.models["denoiser"], torch.device("meta"))
        if is_adapted:
            add_adapters(denoiser, LoraConfig(), self.family.lora_targets, self.seed)
        round_frozen(denoiser, dtype)
        for parameter in denoiser.parameters() if is_gathered else ():
            parameter.data = parameter.data.to(dtype)
        return without_values(denoiser, self.device, self.shapes)

    def can_have_lora(self, config: Config) -> bool:
        """Whether adapters could be trained instead of all weights."""
        if self.has_lora or config.model.trainable is not None or importlib.util.find_spec("peft") is None:
            return False
        try:
            self._denoiser_of(True, self.dtype(config))
        except InputError:  # no layers that take them
            return False
        return True

    def parameters(self, config: Config) -> list[torch.nn.Parameter]:
        """Of all that a step trains or trains around."""
        others = [p for name, model in self.models.items() if name != "denoiser" for p in model.parameters()]
        held = {"device": "meta", "dtype": self.dtype(config)}  # what is frozen
        others = [p if p.requires_grad else torch.nn.Parameter(torch.empty_like(p, **held), False) for p in others]
        return [*self.denoiser(config).parameters(), *others]

    def frozen(self, config: Config, cached: bool) -> dict[str, int]:
        """Bytes of the frozen parts that are in memory, or of those that caches stand in for; none of what
        stays on the disk."""
        sizes = {}
        for name, module in self._family_of(self.dtype(config)).frozen_modules().items():
            is_image_part = name in (self.family.image_part, *self.family.condition_parts)
            if config.model.offload_text_encoders and not is_image_part:
                continue
            if cached == (config.data.cache_latents if is_image_part else config.data.cache_text):
                sizes[name] = num_bytes((*module.parameters(), *module.buffers()))
        return sizes

    def state_bytes(self, config: Config) -> Counter[torch.dtype]:
        """Of the optimizer's state, by their dtype."""
        numbers, sizes = Counter(), Counter()
        for parameter in self.parameters(config):
            numbers[parameter.ndim] += parameter.numel() if parameter.requires_grad else 0
        for ndim, number in numbers.items():
            for dtype, size in state_per_element(type(self.optimizer), config.optimizer.init_args, ndim).items():
                is_rounded = config.optimizer.class_path != self.class_path and dtype == torch.float32
                sizes[dtype] += round(size * number / (4 if is_rounded else 1))
        return sizes

    # ── Activations ──────────────────────────────────────────────────────────────────────────────────────────
    def activations(self, config: Config) -> int | None:
        """Their bytes; None, and `uncounted` says why, where they cannot be counted."""
        try:
            is_adapted, dtype = config.model.lora is not None and not self.has_lora, self.dtype(config)
            denoiser = self._denoiser_of(is_adapted, dtype, config.train.shard != "none")
            counted = self._count(denoiser, self.num_images(config), self.size(config), dtype)
        except Exception as error:  # whatever libraries raise on tensors that have no values
            self.uncounted = shorten(one_line(error), 100)
            return None
        if config.train.gradient_checkpointing and counted.checkpointed is not None:
            return counted.checkpointed
        return counted.kept

    def _count(self, denoiser: torch.nn.Module, batch: int, size: tuple[int, ...], dtype: torch.dtype) -> Activations:
        predict = self._predict_in(dtype)
        with self._shapes_in(dtype):
            return count_activations(denoiser, predict, *self.inputs(batch, size, dtype))

    def encoding(self, config: Config) -> int:
        """Bytes that the VAE takes at most, besides its weights, for what it encodes at a time, pixel values or
        waveforms among them; 0, and `uncounted` says why, where they cannot be counted. Of tiles, one counts."""
        if self.family.image_part is None:
            return 0
        size = tile = self.size(config)
        if config.model.vae_tiling:
            sides = self.family.tile_size  # the last ones
            tile = (*size[: -len(sides)], *map(min, size[-len(sides) :], sides))
        try:
            of_tile = self._encoding_of(tile, self.dtype(config))
        except Exception as error:  # whatever libraries raise on tensors that have no values
            self.uncounted = shorten(one_line(error), 100)
            return 0
        given, of_given = (4 * _channels_of(self.family, of) * math.prod(of) for of in (size, tile))
        number = self.num_images(config)
        if config.data.cache_latents:
            number = ENTRIES_PER_BATCH if len(size) == 2 else 1
        return number * given + (1 if config.model.vae_slicing else number) * (of_tile - of_given)

    def _encoding_of(self, size: tuple[int, ...], dtype: torch.dtype) -> int:
        """The same of one image, sound or clip: of a long clip by shorter ones, since each frame more takes as much as
        the one before it."""
        family = self._family_of(dtype)
        if len(size) == 3 and size[0] > (longer := 4 * family.frame_multiple + 1):
            shorter = 2 * family.frame_multiple + 1
            most, less = (self._encoding_of((number, *size[1:]), dtype) for number in (longer, shorter))
            return most + (size[0] - longer) * (most - less) // (longer - shorter)
        return peak_bytes(self.shapes, _latents_of, family, size)

    def flops(self, config: Config) -> dict[str, int]:
        """FLOPs of a process's part of a batch by what takes them: the denoiser's forward and backward pass, what
        gradient checkpointing computes once more, of pairs the reference, and the encoders that no cache stands in for,
        where they are trained with a backward pass of twice the forward one."""
        size, dtype, batch = self.size(config), torch.float32, self.micro_batch(config)  # counted the same in any
        denoiser = self._denoiser_of(config.model.lora is not None and not self.has_lora, dtype)
        images = self.num_images(config)
        inputs = self.inputs(images, size, dtype)
        predict = partial(self._predict_in(dtype), denoiser)
        with without_checkpointing(denoiser):
            with torch.enable_grad():
                flops = {"forward and backward pass": flops_of_shapes(self.shapes, predict, *inputs)}
            if config.train.gradient_checkpointing:
                with torch.no_grad():
                    flops["recomputed"] = flops_of_shapes(self.shapes, predict, *inputs)
        family = self._family_of(dtype)
        with torch.no_grad():
            if self.is_text:
                return {name: number for name, number in flops.items() if number}
            if family.image_part and not config.data.cache_latents:
                flops[family.image_part] = images * flops_of_shapes(self.shapes, _latents_of, family, size)
            if not config.data.cache_text:
                times = 3 if config.model.train_text_encoder else 1
                flops["text encoders"] = times * batch * flops_of_shapes(self.shapes, family.null_conditioning)
            if self.are_pairs:
                flops["reference"] = flops_of_shapes(self.shapes, predict, *inputs)
            if config.strategy.dream_training:
                flops["DREAM's probe"] = flops_of_shapes(self.shapes, predict, *inputs)
        return {name: number for name, number in flops.items() if number}

    def inputs(self, batch: int, size: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor | Conditioning, ...]:
        """What the denoiser is given besides itself, without values; captions and texts fill their length."""
        if self.is_text:
            with self.shapes:
                tokens = torch.empty(batch, *size, dtype=torch.int64, device=self.device)
            return tokens, torch.ones(batch, *size, dtype=torch.bool, device=self.device)
        latents, conditioning = self._inputs_of(size, dtype)
        time = torch.float32 if self.family.schedule.has_continuous_time else torch.int64

        def drawn(name: str, tensor: torch.Tensor) -> torch.Tensor:
            make = torch.ones if name.endswith("_mask") else torch.empty
            return make((batch, *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)

        masks = {name: drawn(name, value) for name, value in conditioning.items() if name.endswith("_mask")}
        with self.shapes:
            others = {name: drawn(name, value) for name, value in conditioning.items() if name not in masks}
            timesteps = torch.empty(batch, dtype=time, device=self.device)
            return drawn("latents", latents), timesteps, {name: (masks | others)[name] for name in conditioning}

    def _inputs_of(self, size: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, Conditioning]:
        """The latents and the conditioning of one sample."""
        family = self._family_of(dtype)
        with self.shapes, torch.no_grad():
            given = family.null_first_frames(*size) if len(size) == 3 else {}
            return _latents_of(family, size), family.null_conditioning() | given

    def _predict_in(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """The family's, which may ask frozen parts beside the denoiser."""
        return (self.family if self.is_text else self._family_of(dtype, self.device)).predict

    def _family_of(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Family:
        return self.family.of_shapes(dtype, partial(without_values, device=device, shapes=self.shapes))

    @contextmanager
    def _shapes_in(self, dtype: torch.dtype) -> Iterator[None]:
        is_mixed = dtype != torch.float32
        with self.shapes, torch.autocast(self.device.type, dtype if is_mixed else None, enabled=is_mixed):
            yield


def _channels_of(family: ImageFamily, size: tuple[int, ...]) -> int:
    """Of an image, a video or a sound of this size."""
    return family.config_of(family.image_part).audio_channels if len(size) == 1 else 3


def _latents_of(family: ImageFamily, size: tuple[int, ...]) -> torch.Tensor:
    """Those of an image, a video or a sound without values."""
    moments = family.encode_images(torch.empty(1, _channels_of(family, size), *size))
    return family.sample_latents(moments, torch.empty_like(moments[:, 0]))


def state_per_element(cls: type[torch.optim.Optimizer], init_args: dict[str, Any], ndim: int) -> Counter[torch.dtype]:
    """Bytes that an optimizer keeps for each element of a weight of this rank, by their dtype: those after one step of
    a small one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # what some are made for
    weight = torch.nn.Parameter(torch.ones([round(MEASURED_AT ** (1 / max(1, ndim)))] * max(1, ndim), device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = cls([{"name": "denoiser", "params": [weight]}], **init_args)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    sizes = Counter()
    for value in tree_leaves(dict(optimizer.state[weight])):
        if isinstance(value, torch.Tensor) and value.numel() > 1:  # one counts the steps
            sizes[value.dtype] += value.nbytes / weight.numel()
    return sizes
