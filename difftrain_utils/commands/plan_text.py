"""What `difftrain plan` prints: an estimate in words, at most 80 columns wide, and as JSON."""

import math
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from difftrain_utils.config.config import Config
from difftrain_utils.media.media import media_of
from difftrain_utils.run.estimate import FULL, Estimate, Machines, peak_tflops
from difftrain_utils.run.memory import Planner
from difftrain_utils.run.summary import count

LABEL, WIDTH = 40, 80  # columns


@dataclass
class Plan:
    """An estimate, and what it is of."""

    estimate: Estimate
    planner: Planner
    machines: Machines
    config: Config
    mfu: float
    storage: float
    """10⁹ bytes a second."""
    price: float | None
    """Of a GPU for an hour."""

    def __str__(self) -> str:
        blocks = self._title, self._memory, self._step, self._run, self._data, self._checkpoints, self._assumptions
        return "\n\n".join("\n".join(block()) for block in blocks)

    # ── What is printed ──────────────────────────────────────────────────────────────────────────────────────
    def _title(self) -> Iterator[str]:
        planner, config, train = self.planner, self.config, self.config.train
        yield "An estimate, of shapes alone: nothing was trained, and no weight was read"
        yield ""
        parameters = planner.parameters(config)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        share = f"{count(trained)} of {count(total)}" if trained < total else f"all {count(total)}"
        kind = planner.family.class_name
        yield from _entry("model", f"{config.model.pretrained_model_name_or_path} ({kind}), {share} parameters trained")
        yield from _entry("on", f"{self._on}, {self._precision}; {self._engine}")
        parts, micro_batch = train.gradient_accumulation_steps, planner.micro_batch(config)
        number = self.machines.number
        split = [f"{number} GPU{'s' * (number > 1)}"] + [f"{parts} parts"] * (parts > 1) + [f"{micro_batch}"]
        of = "" if len(planner.data.buckets.sizes if planner.data.buckets else ()) < 2 else ", the largest bucket"
        yield from _entry(
            "batch", f"{train.batch_size} samples of {planner.describe_size(config)}{of} = {' × '.join(split)}"
        )

    def _memory(self) -> Iterator[str]:
        estimate, capacity = self.estimate, self.machines.capacity
        yield "Memory of a GPU, 10⁹ bytes"
        for name, size in estimate.memory.items():
            if size:
                yield _row(name, _gb(size))
        reason = estimate.not_counted.get("activations")
        yield _row("sum" if reason is None else "sum without activations", _gb(estimate.total))
        yield _row(f"of {self.machines.name}", _gb(capacity))
        if reason is not None:
            yield from _wrap(f"activations cannot be counted: {reason}")
        yield from _wrap(self._verdict)
        if estimate.while_caching:
            yield _row("before it, while caching", _gb(estimate.while_caching))
        if estimate.options:
            yield "  each of these by itself leaves:"
            for option, size in estimate.options:
                yield _row(f"  {option}", _gb(size)) + ("  fits" if self._fits(size) else "")
        if len(estimate.way) > 1:
            yield "  one on top of the other:"
            names = [_field(option) for option, _ in estimate.way]
            for i, (option, size) in enumerate(estimate.way):
                if _field(option) not in names[i + 1 :]:
                    yield _row(f"  {option}", _gb(size)) + ("  fits" if self._fits(size) else "")
        yield from self._main_memory()

    def _main_memory(self) -> Iterator[str]:
        node = "" if self.machines.number == 1 else " of a node"
        yield _row(f"main memory{node} at the start", _gb(self.estimate.main_memory))
        if self.estimate.main_memory_later:
            yield _row(f"main memory{node} later", _gb(self.estimate.main_memory_later))

    def _step(self) -> Iterator[str]:
        yield "A step"
        time = self.estimate.time
        if time is None:
            yield from _wrap(f"its time is not known: FLOPs cannot be counted: {self.estimate.not_counted['FLOPs']}")
            return
        for name, flops in time.flops.items():
            yield _row(f"{name}, of a GPU", f"{flops / 1e12:.4g}", "TFLOP")
        peak = peak_tflops(self.planner, self.machines.gpu, self.config)
        yield _row(f"computing at {self.mfu:g} of {peak:g} TFLOP/s", _seconds(time.computing))
        for name, traffic in time.traffic.items():
            yield _row(
                name, _gb(traffic.size), f"GB at {traffic.bandwidth / 1e9:.3g} GB/s: {_seconds(traffic.seconds)}"
            )
        low, high = time.step
        if time.traffic:
            yield _row("a step, communication hidden", _seconds(low))
            yield _row("a step, not hidden at all", _seconds(high))

    def _run(self) -> Iterator[str]:
        steps, size, estimate = self.config.train.max_steps, self.config.train.batch_size, self.estimate
        yield "The run"
        rows = estimate.reading.rows
        yield _row("steps", f"{steps}")
        yield _row("samples", count(steps * size), f"({steps * size / rows:.3g} epochs)" if rows else "")
        if self.hours is None:
            return
        yield _row("hours", _range(self.hours))
        if self.machines.number > 1:
            yield _row("GPU-hours", _range(self.gpu_hours))
        if self.price is not None:
            yield _row(f"at {self.price:g} a GPU-hour", _range(tuple(self.price * hours for hours in self.gpu_hours)))

    def _data(self) -> Iterator[str]:
        reading, config = self.estimate.reading, self.config
        yield "Data, 10⁹ bytes"
        if reading.rows is None:
            yield from _wrap("the data is not in a folder here: how much is to be read of it is not known")
        elif self.planner.is_text:
            yield from _wrap(f"{media_of(config.data).describe(reading.rows, config.data)}, small beside the rest")
        elif reading.mean_bytes is None:
            yield from _wrap(f"{reading.rows} rows of a stream, whose size is not known")
        else:
            total = reading.rows * reading.mean_bytes
            rows = media_of(config.data).describe(reading.rows, config.data)
            yield _row(f"{rows}, {reading.mean_bytes / 1e3:.4g} kB each", _gb(total))
            again = " and cache" if config.data.cache_latents else ""
            yield _row(f"read before step 1, to check{again}", _gb((1 + config.data.cache_latents) * total))
        if self.planner.is_text:
            return
        samples, each = config.train.max_steps * config.train.batch_size, reading.cached
        if not config.data.cache_latents:
            if reading.mean_bytes is None:
                return
            each += reading.mean_bytes
        noun = media_of(config.data).NOUN
        what = {0: noun, 1: f"{noun} and caches", 2: "caches"}[bool(reading.cached) + config.data.cache_latents]
        yield _row(f"read while training, of {what}", _gb(samples * each))
        if self.estimate.time is not None:
            rate = config.train.batch_size * each / self.estimate.time.step[0]
            yield _row("the same, at most", f"{_gb(rate)}", "a second")

    def _checkpoints(self) -> Iterator[str]:
        estimate, train = self.estimate, self.config.train
        yield "A checkpoint, 10⁹ bytes"
        for name, size in estimate.checkpoint.items():
            yield _row(name, _gb(size))
        size = sum(estimate.checkpoint.values())
        yield _row("sum", _gb(size))
        seconds = size / (self.storage * 1e9)
        meanwhile = "while training goes on" if train.save_in_background else "training waits"
        yield _row(f"written at {self.storage:g} GB/s", _seconds(seconds), f"; {meanwhile}")
        number = math.ceil(train.max_steps / train.save_every) if train.save_every else 1
        kept = min(number, train.keep_checkpoints or number)
        yield _row(f"{number} in the run, of which {kept} {'stays' if kept == 1 else 'stay'}", _gb(kept * size))

    def _assumptions(self) -> Iterator[str]:
        yield "Assumed"
        for text in self.assumptions:
            yield from _wrap(text, "- ")

    @property
    def assumptions(self) -> list[str]:
        """What the estimate rests on, in words."""
        gpu, machines, train = self.machines.gpu, self.machines, self.config.train
        found = [
            f"Memory: {machines.name} has {gpu.memory_gb:g}·10⁹ bytes, of which {FULL:.0%} are for what is counted. "
            "Not counted are CUDA itself, workspaces of kernels, gradients of activations, fragmentation and "
            "evaluation. docs/plan.md has what was measured."
        ]
        if self.estimate.time is not None:
            found.append(
                f"Time: all operations counted run at --mfu {self.mfu:g} of the peak in {self._precision}. Not in it: "
                "waiting for data, making caches, compiling, evaluation, checkpoints, the optimizer's step."
            )
        if self.estimate.time is not None and machines.number > 1:
            nodes = machines.number > machines.per_node
            between = f", {machines.between_gb:.4g} from a GPU to another node" if nodes else ""
            found.append(
                f"Communication: rings, {gpu.within_gb:g} GB/s from a GPU to another in its node{between}, one way, "
                f"without latency. All hidden behind computing, a step takes the longer of both; not at all, their sum."
            )
        if train.precision is None:
            found.append("Precision: train.precision is null; fp32 is assumed, as accelerate does by itself.")
        if train.shard_offload and train.shard == "full":
            found.append("Offload: copies to and from main memory and the optimizer on the CPU are not in the time.")
        full = "texts fill data.sequence_length" if self.planner.is_text else "captions are as long as the model takes"
        found.append(f"Peaks and bandwidths are the makers' own; {full}.")
        return found

    # ── What follows from the estimate ───────────────────────────────────────────────────────────────────────
    @property
    def hours(self) -> tuple[float, float] | None:
        """Of all steps, if all communication is hidden and if none is."""
        time = self.estimate.time
        return None if time is None else tuple(self.config.train.max_steps * seconds / 3600 for seconds in time.step)

    @property
    def gpu_hours(self) -> tuple[float, float] | None:
        return self.hours and tuple(self.machines.number * hours for hours in self.hours)

    def to_json(self) -> dict[str, Any]:
        """All numbers, in bytes, seconds and hours."""
        estimate, config, machines, time = self.estimate, self.config, self.machines, self.estimate.time
        traffic = {} if time is None else {k: asdict(v) | {"seconds": v.seconds} for k, v in time.traffic.items()}
        return {
            "model": config.model.pretrained_model_name_or_path,
            "gpu": machines.name,
            "gpus": machines.number,
            "gpus_per_node": machines.per_node,
            "precision": self._precision,
            "micro_batch": self.planner.micro_batch(config),
            "memory": estimate.memory,
            "memory_total": estimate.total,
            "memory_of_gpu": machines.capacity,
            "fits": None if "activations" in estimate.not_counted else self._fits(estimate.total),
            "memory_while_caching": estimate.while_caching,
            "options": [{"option": option, "memory_total": size} for option, size in estimate.options],
            "way_to_fit": [{"option": option, "memory_total": size} for option, size in estimate.way],
            "main_memory_of_node": max(estimate.main_memory, estimate.main_memory_later),
            "flops": time and time.flops,
            "seconds_computing": time and time.computing,
            "communication": traffic,
            "seconds_of_step": time and time.step,
            "steps": config.train.max_steps,
            "samples": config.train.max_steps * config.train.batch_size,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "price": self.price and self.gpu_hours and [self.price * hours for hours in self.gpu_hours],
            "data": asdict(estimate.reading),
            "checkpoint": estimate.checkpoint,
            "seconds_of_checkpoint": sum(estimate.checkpoint.values()) / (self.storage * 1e9),
            "not_counted": estimate.not_counted,
            "assumptions": self.assumptions,
        }

    # ── In words ─────────────────────────────────────────────────────────────────────────────────────────────
    def _fits(self, size: int) -> bool:
        return size <= FULL * self.machines.capacity

    @property
    def _verdict(self) -> str:
        estimate, capacity = self.estimate, self.machines.capacity
        total, room = estimate.total, capacity - estimate.total
        if total > capacity:
            nothing = not any(self._fits(size) for _, size in estimate.options) and not estimate.way
            return "it does not fit" + (", and no options were found with which it would" if nothing else "")
        if "activations" in estimate.not_counted:
            return "whether it fits is not known"
        if self._fits(total):
            return f"it fits by this estimate, with {_gb(room)} for what is not counted"
        return f"it may not fit: {_gb(room)} are left for what is not counted"

    @property
    def _on(self) -> str:
        number, nodes = self.machines.number, self.machines.number // self.machines.per_node
        in_nodes = f" in {nodes} nodes of {self.machines.per_node}" if nodes > 1 else ""
        return f"{number} {self.machines.name}{in_nodes}"

    @property
    def _engine(self) -> str:
        train, number = self.config.train, self.machines.number
        if number == 1:
            return "one process"
        if train.shard == "none":
            return "DDP, each GPU holds all"
        shards = self.planner.num_shards(self.config)
        kind = "ZeRO-3" if train.reshard_after_forward else "ZeRO-2"
        among = f"shares of {shards}" + (f", {number // shards} times" if shards < number else "")
        return f"FSDP2 ({kind}), {among}" + (", in main memory" if train.shard_offload else "")

    @property
    def _precision(self) -> str:
        precision = self.planner.accelerator.mixed_precision.replace("no", "fp32")
        return "tf32" if precision == "fp32" and self.config.train.tf32 else precision


def _field(option: str) -> str:
    """What an option is of, without its value."""
    return re.split(r" (?=\d)", option)[0]


def _row(name: str, value: str, unit: str = "") -> str:
    return f"  {name:<{LABEL}} {value:>9}{unit if unit.startswith(';') else f' {unit}' if unit else ''}".rstrip()


def _entry(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name:8}{text}", _width(), subsequent_indent=" " * 8, break_on_hyphens=False)


def _wrap(text: str, bullet: str = "") -> list[str]:
    indent = "  " + " " * len(bullet)
    return textwrap.wrap(text, _width(), initial_indent=f"  {bullet}", subsequent_indent=indent, break_on_hyphens=False)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDTH)


def _gb(size: float) -> str:
    """Bytes in 10⁹."""
    return _number(size / 1e9)


def _number(value: float) -> str:
    """Three digits, and none after the point of what is larger."""
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _seconds(seconds: float) -> str:
    return f"{_number(seconds)} s"


def _range(values: tuple[float, ...]) -> str:
    low, high = map(_number, values)
    return low if low == high else f"{low} to {high}"
