"""What will run, in a few lines before the first step."""

import shutil
import textwrap
from pathlib import Path

import torch
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.data.clips import ClipBuckets
from difftrain_utils.data.load import Data
from difftrain_utils.devices import device_name
from difftrain_utils.media.media import media_of
from difftrain_utils.optimization.sharding import is_sharded
from difftrain_utils.run.memory import summarise_memory
from difftrain_utils.run.run_folder import step_of

LABEL = 9  # columns


def describe_run(
    accelerator: Accelerator,
    family,
    models: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    data: Data,
    checkpoint: Path | None,
    config: Config,
) -> str:
    """Model, data, batch, steps, device, memory, folder, and how to resume: as wide as the terminal, at most 120
    columns. Empty on other processes than the main one."""
    if not accelerator.is_main_process:
        return ""
    lines = {
        "model": _model(family, models, config),
        "data": _data(data, config),
        "batch": _batch(accelerator, config),
        "steps": _steps(data, checkpoint, config),
        "device": _device(accelerator, config),
        "memory": summarise_memory(accelerator, family, models, optimizer, data, config),
        "output": _output(config),
        "resume": "the same command with --resume-from latest",
    }
    width = min(shutil.get_terminal_size().columns, 120)
    indent = {"subsequent_indent": " " * LABEL, "break_long_words": False, "break_on_hyphens": False}
    wrapped = [textwrap.wrap(f"{name:{LABEL}}{text}", width, **indent) for name, text in lines.items()]
    return "\n".join(line for of_name in wrapped for line in of_name)


def count(number: int) -> str:
    """1234567 as `1.23 M`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _model(family, models: dict[str, torch.nn.Module], config: Config) -> str:
    weights = [p for model in models.values() for p in model.parameters()]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    how = [] if config.model.lora is None else [f"adapters of rank {config.model.lora.rank}"]
    how += ["from random weights"] if family.init_seed is not None else []
    named = [family.denoiser_part, *(name.replace("_", " ") for name in models if name != "denoiser")]
    total = sum(p.numel() for p in weights)
    share = f"{count(trained)} of {count(total)}" if trained < total else f"all {count(total)}"
    of = f"parameters of {' and '.join(named)} are trained"
    name = f"{config.model.pretrained_model_name_or_path} ({family.class_name})"
    return ", ".join([f"{name}: {share} {of}", *how])


def _data(data: Data, config: Config) -> str:
    section, media = config.data, media_of(config.data)
    names = [section.dataset] if section.sources is None else [source.dataset for source in section.sources]
    rows = f"{'a stream of ' if section.streaming else ''}{media.describe(len(data.rows), section)}"
    held_out = "" if data.validation_rows is None else f" and {len(data.validation_rows)} held out"
    size = f", {media.describe_size(section)}"
    if isinstance(data.buckets, ClipBuckets):
        size = f" {data.buckets.describe_sizes()}"
    elif data.buckets is not None:
        number = len(data.buckets.sizes)
        size = f", {number} size{'s' * (number > 1)} of about {media.describe_size(section)}"
    cached = [name for name in ("latents", "text") if getattr(section, f"cache_{name}", False)]
    return f"{', '.join(map(str, names))}: {rows}{held_out}{size}" + (
        f"; cached: {' and '.join(cached)}" if cached else ""
    )


def _batch(accelerator: Accelerator, config: Config) -> str:
    processes, parts = accelerator.num_processes, config.train.gradient_accumulation_steps
    size = config.train.batch_size
    if processes * parts == 1:
        return f"{size} samples"
    numbers = {"process": processes, "part": parts}
    split = [f"{n} {name}{'es' if name == 'process' else 's'}" for name, n in numbers.items() if n > 1]
    return f"{size} samples = {' x '.join(split)} x {size // (processes * parts)}"


def _steps(data: Data, checkpoint: Path | None, config: Config) -> str:
    start = 0 if checkpoint is None else step_of(checkpoint.resolve().name) or 0
    steps = f"{config.train.max_steps}" if not start else f"{start} to {config.train.max_steps}"
    epochs = config.train.max_steps * config.train.batch_size / data.samples_per_epoch
    left_out = 0 if data.buckets is None else len(data.rows) - data.samples_per_epoch
    why = f"; each leaves out {left_out} of {len(data.rows)} {media_of(config.data).NOUN}, which make no whole batch"
    return f"{steps}, {epochs:.3g} epochs of {data.samples_per_epoch} samples{why if left_out > 0 else ''}"


def _device(accelerator: Accelerator, config: Config) -> str:
    name = device_name(accelerator.device)
    if name == "cpu":
        threads = torch.get_num_threads()
        name += f" ({threads} thread{'s' * (threads > 1)})"
    compiled = "" if config.train.compile is None else "; the first step compiles the denoiser, which takes a while"
    processes = accelerator.num_processes
    shares = f", all shared out among {config.train.shard_size or processes} processes"
    shares = shares if is_sharded(config.train, processes) else ""
    return f"{name}, {accelerator.mixed_precision.replace('no', 'fp32')}{shares}{compiled}"


def _output(config: Config) -> str:
    train = config.train
    checkpoints = f"a checkpoint every {train.save_every} steps" if train.save_every else "a checkpoint at the end"
    evaluated = f", evaluated every {train.eval_every}" if train.eval_every else ""
    return f"{train.output_dir}: {checkpoints}{evaluated}"
