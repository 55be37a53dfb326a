"""What a run would take on GPUs that are not here, from shapes alone: memory, time, data and checkpoints."""

import math
import os
from dataclasses import dataclass, field

import numpy as np

from difftrain_utils.config.config import Config
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.errors import RowError, one_line, shorten
from difftrain_utils.families.diffusers_family import ENCODED_AT_ONCE
from difftrain_utils.media import audio, pairs, video
from difftrain_utils.media.image import read_bytes
from difftrain_utils.media.recordings import open_file
from difftrain_utils.optimization.sharding import num_bytes
from difftrain_utils.run.gpus import Gpu, peak_of
from difftrain_utils.run.memory import Planner

FULL = 0.9  # of a GPU's memory; the rest is for what is not counted
MEASURED_ROWS = 500  # for the mean size of an image


@dataclass
class Machines:
    """GPUs in nodes of `per_node`, of which each sends `between_gb` 10⁹ bytes a second to other nodes."""

    name: str
    gpu: Gpu
    number: int
    per_node: int
    between_gb: float

    @property
    def capacity(self) -> int:
        """Bytes of a GPU."""
        return round(self.gpu.memory_gb * 1e9)

    def bandwidth(self, processes: int, stride: int = 1) -> float:
        """Bytes a second that each of so many processes in a ring sends, where all such rings send at once: between
        nodes a ring has the ports of those of its GPUs that are in a node."""
        in_node = max(1, min(processes, self.per_node // stride))
        if processes <= in_node:
            return self.gpu.within_gb * 1e9
        return min(self.gpu.within_gb, in_node * self.between_gb) * 1e9


@dataclass
class Traffic:
    """Bytes that a process sends in a step, and as many that it gets."""

    size: int
    bandwidth: float
    """Bytes a second."""

    @property
    def seconds(self) -> float:
        return self.size / self.bandwidth


@dataclass
class Time:
    """Of a step, in seconds; times are (if all communication is hidden behind computing, if none is)."""

    flops: dict[str, int]
    """Of a GPU, by what takes them."""
    computing: float
    traffic: dict[str, Traffic]

    @property
    def communicating(self) -> float:
        return sum(kind.seconds for kind in self.traffic.values())

    @property
    def step(self) -> tuple[float, float]:
        return max(self.computing, self.communicating), self.computing + self.communicating


@dataclass
class Reading:
    """Of the data."""

    rows: int | None
    """How many images, pairs, videos, sounds or texts there are; None: the data is not here."""
    mean_bytes: float | None
    """Of an image, a pair, a video or a sound; None: not known, or texts, which are small."""
    cached: int
    """Bytes of a sample that come from caches, at most."""


@dataclass
class Estimate:
    """Bytes, but for times."""

    memory: dict[str, int]
    """Of a GPU, by what holds it."""
    while_caching: int
    options: list[tuple[str, int]]
    """What each by itself would leave, in the order of `Planner.options`."""
    way: list[tuple[str, int]]
    """What makes it fit, one option on top of the other; [] if it does, or nothing is known that would."""
    time: Time | None
    main_memory: int
    """Of a node while the run starts: each process reads the whole denoiser in float32."""
    main_memory_later: int
    """Of a node with `train.shard_offload`."""
    checkpoint: dict[str, int]
    reading: Reading
    not_counted: dict[str, str] = field(default_factory=dict)
    """Why, by what: "activations", "FLOPs"."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def make_estimate(planner: Planner, data: Data | None, machines: Machines, mfu: float, config: Config) -> Estimate:
    """Of the run that `planner` is of, on `machines`, at so much of their peak. No `data`: it is not here."""
    memory, per_node, missing = planner.held(config), min(machines.per_node, machines.number), {}
    if planner.uncounted is not None:
        missing["activations"] = planner.uncounted
    limit = round(FULL * machines.capacity)
    way = planner.way_below(config, limit)
    time = None
    try:
        parts = config.train.gradient_accumulation_steps
        flops = {name: parts * number for name, number in planner.flops(config).items()}
        computing = sum(flops.values()) / (mfu * 1e12 * peak_tflops(planner, machines.gpu, config))
        time = Time(flops, computing, traffic_of(planner, machines, config))
    except Exception as error:  # whatever libraries raise on tensors that have no values
        missing["FLOPs"] = shorten(one_line(error), 100)
    denoiser = sum(4 * parameter.numel() for parameter in planner.models["denoiser"].parameters())
    offloaded = sum(planner.shares(config).values()) if planner.is_offloaded(config) else 0
    return Estimate(
        memory,
        planner.while_caching(config),
        [(option, needed) for option, _, needed in planner.that_need_less(config)],
        [(option, needed) for option, _, needed in way] if way and way[-1][2] <= limit else [],
        time,
        per_node * denoiser,
        per_node * offloaded,
        checkpoint_bytes(planner, config),
        reading_of(planner, data, config),
        missing,
    )


def peak_tflops(planner: Planner, gpu: Gpu, config: Config) -> float:
    """`train.peak_tflops`, or the GPU's peak in the run's precision."""
    precision = planner.accelerator.mixed_precision
    return config.train.peak_tflops or peak_of(gpu.tflops, precision, config.train.tf32)


def traffic_of(planner: Planner, machines: Machines, config: Config) -> dict[str, Traffic]:
    """What a process sends in a step, by collectives in rings: an all-reduce of B bytes among N sends 2·(N-1)/N·B, an
    all-gather and a reduce-scatter (N-1)/N·B each.

    Without shares, all gradients are all-reduced once, in float32. With shares, in each part of the batch, all weights
    are gathered in the run's precision for the forward pass, and, unless they are kept, for the backward pass, and
    gradients are scattered in float32; groups that hold the same all-reduce their shares of them."""
    train, processes = config.train, machines.number
    trained = planner.trained_bytes(config)
    if train.shard == "none":
        size = round(2 * (processes - 1) / processes * trained)
        return {"all-reduce of gradients": Traffic(size, machines.bandwidth(processes))} if processes > 1 else {}
    shards, parts = planner.num_shards(config), train.gradient_accumulation_steps
    groups, others = processes // shards, (shards - 1) / shards
    within = machines.bandwidth(shards)
    weights = planner.dtype(config).itemsize * sum(parameter.numel() for parameter in planner.parameters(config))
    times = parts * (2 if train.reshard_after_forward else 1)
    found = {"all-gather of weights": Traffic(round(times * others * weights), within)}
    found["reduce-scatter of gradients"] = Traffic(round(parts * others * trained), within)
    if groups > 1:
        size = round(parts * 2 * (groups - 1) / groups * trained / shards)
        found["all-reduce of shares"] = Traffic(size, machines.bandwidth(groups, shards))
    if train.shard_encoders:
        frozen = planner.frozen(config, cached=False).items()
        encoders = sum(size for name, size in frozen if name != planner.family.image_part)
        lots = parts * math.ceil(planner.micro_batch(config) / ENCODED_AT_ONCE)
        found["all-gather of encoders"] = Traffic(round(lots * others * encoders), within)
    return {name: traffic for name, traffic in found.items() if traffic.size}


def checkpoint_bytes(planner: Planner, config: Config) -> dict[str, int]:
    """Of a checkpoint, by what is in it."""
    found = {"trained weights": planner.trained_bytes(config)}
    found["optimizer state"] = round(planner.state_bytes(config).total())
    found["averages"] = planner.average_bytes(config, everywhere=True)
    return {name: size for name, size in found.items() if size}


def reading_of(planner: Planner, data: Data | None, config: Config) -> Reading:
    """What the data has to be read for; see `Reading`."""
    if planner.is_text:
        return Reading(None if data is None else len(data.rows), None, 0)
    latents, _, conditioning = planner.inputs(1, planner.size(config), planner.dtype(config))
    images, itemsize = 2 if planner.are_pairs else 1, planner.moments_dtype(config).itemsize
    moments = images * 2 * latents.numel() * itemsize  # mean and standard deviation
    cached = config.data.cache_latents * moments + config.data.cache_text * num_bytes(conditioning.values())
    if data is None:
        return Reading(None, None, cached)
    return Reading(len(data.rows), mean_row_bytes(data.rows), cached)


def mean_row_bytes(rows) -> float | None:
    """Of some rows, spread over all; None of a stream."""
    if not isinstance(rows, MappedRows):
        return None
    sizes = []
    for index in np.unique(np.linspace(0, len(rows) - 1, MEASURED_ROWS).astype(int)).tolist():
        try:
            sizes.append(_row_bytes(rows[index]))
        except RowError:  # the run says what it makes of it
            continue
    return sum(sizes) / len(sizes) if sizes else None


def _row_bytes(row) -> int:
    """Of a row's files. Raises RowError if one cannot be read."""
    if isinstance(row, (video.Row, audio.Row)):
        content, noun = (row.video, "video") if isinstance(row, video.Row) else (row.audio, "sound")
        with open_file(content, row.name, noun) as file:
            return file.seek(0, os.SEEK_END)
    images = [row.image, row.rejected] if isinstance(row, pairs.Row) else [row.image]
    return sum(len(read_bytes(image, row.name)) for image in images)
