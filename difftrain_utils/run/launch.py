"""The start of a run: accelerate and the machine as they were asked for, all that can be wrong with the input found
before anything is written; and an end without a false failure."""

import atexit
import os
import time
import warnings
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from difftrain_utils.config.config import MIXED_PRECISION, Config
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.load import Data
from difftrain_utils.data.rows import MappedRows, read_captions
from difftrain_utils.errors import InputError, blame, check_installed
from difftrain_utils.media.media import media_of
from difftrain_utils.processes import on_main_process
from difftrain_utils.run.checkpoints import check_origin, check_weights
from difftrain_utils.run.lock import lock_used_folder
from difftrain_utils.run.machine import check_compile, keep_freed_memory, set_deterministic, set_tf32, use_onednn
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.rendezvous import init_method
from difftrain_utils.run.run_folder import TRACKERS
from difftrain_utils.run.time_limit import time_limit
from difftrain_utils.run.tracking import check_trackers
from difftrain_utils.terminal import announce

LONGEST_WAIT = timedelta(hours=12)  # of a process for another: the main process reads all data before the first step
# who says how many processes were started, innermost first: torchrun, Open MPI, other MPIs, Slurm
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def launch(config: Config) -> Accelerator:
    """Set up the machine and accelerate. All processes call it first.

    Raises:
        InputError: this machine, or what was launched, cannot do what the config asks for; or another run is in the
            folder.
        ProcessError: the processes do not find each other.
    """
    train = config.train
    check_folder(Path(train.output_dir))
    if train.deterministic:
        set_deterministic()
    if train.cpu_threads:
        torch.set_num_threads(train.cpu_threads)
    trackers = check_trackers(train.report_to)
    meeting = init_method(train.init_minutes)
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    # gloo for shares that lie in main memory
    backend = {"backend": "cpu:gloo,cuda:nccl"} if train.shard_offload and torch.cuda.is_available() else {}
    late = f"the processes came, but do not hear each other {train.init_minutes:g} minutes later (train.init_minutes)"
    with time_limit(2 * train.init_minutes, late):
        with blame("train.precision", ValueError):  # what this device cannot do
            accelerator = Accelerator(
                mixed_precision=MIXED_PRECISION[train.precision],
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    train.gradient_accumulation_steps, sync_with_dataloader=False
                ),
                step_scheduler_with_optimizer=False,  # the learning rate is a function of the step alone
                log_with=trackers or None,
                project_dir=Path(train.output_dir) / TRACKERS,
                kwargs_handlers=[
                    InitProcessGroupKwargs(**backend, init_method=meeting, timeout=LONGEST_WAIT),
                    # Else DDP lays its gradients out anew after the first step, and after the first of a resume; and
                    # the order in which three processes or more are summed depends on where a number lies.
                    DistributedDataParallelKwargs(find_unused_parameters=True),
                ],
            )
        check_launch(config, accelerator)
        pause_at_exit(accelerator)
        # the first that all processes do together; before the folder is looked at, because it changes while another run
        # is in it
        on_main_process(accelerator, partial(lock_used_folder, Path(train.output_dir)))
    check_compile(train, accelerator.device)
    set_tf32(train, accelerator.device)
    if accelerator.device.type == "cpu":
        use_onednn(train)
        keep_freed_memory()
    return accelerator


def check_folder(folder: Path) -> None:
    """Raise InputError unless the folder, or the nearest one above it that there is, can be written into."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"train.output_dir: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"train.output_dir: {there} cannot be written into")
    if long := [part for part in folder.parts if len(part.encode(errors="surrogateescape")) > 255]:
        raise InputError(f"train.output_dir: a name must have at most 255 bytes, got {long[0]:.40}…")


def prepare(accelerator: Accelerator, family, models, data: Data, checkpoint: Path | None, config: Config) -> Record:
    """The record of the run that is about to start: read all data once, for their fingerprint, and take the digests of
    the models' weights. Refuses to go on from a checkpoint of other models or of another origin. Nothing is written.

    Raises:
        InputError: the checkpoint has other models or averages, or is of a run with another base model, other data or
            another precision; a row cannot be read, or the model not be told a caption.
        RunError: no pipeline of this family could have this denoiser.
    """
    media = media_of(config.data)
    announce(f"Checking the {media.NOUN}{', the captions' if media.HAS_CAPTIONS else ''} and the model")
    family.check_denoiser(models["denoiser"])
    if checkpoint is not None:
        check_weights(checkpoint, models, config.ema)

    def read_all() -> tuple[dict, dict]:
        for rows in (data.rows if config.data.has_captions else None, data.validation_rows):
            if isinstance(rows, MappedRows):  # a stream is not read twice
                family.check_captions(chain.from_iterable(read_captions(rows, config.data)))
        return family.digests(models["denoiser"]), inspect_splits(data.rows, data.validation_rows, config.data)

    digests, fingerprints = on_main_process(accelerator, read_all)
    record = Record(config, accelerator, family.denoiser_part, digests, fingerprints, data.samples_per_epoch)
    if checkpoint is not None:
        check_origin(checkpoint, record, config)
    return record


def check_launch(config: Config, accelerator: Accelerator) -> None:
    """Raise InputError unless accelerate runs what was launched and configured, and the batch splits over it.

    Accelerate falls back without a word: processes that do not find each other train a copy each, and on a CPU FSDP and
    DeepSpeed become something else.
    """
    launched = next((int(os.environ[name]) for name in WORLD_SIZES if name in os.environ), 1)
    for asked, whose in ((config.train.num_processes, "train.num_processes asks for"), (launched, "launched were")):
        if asked not in (None, accelerator.num_processes):
            raise InputError(
                f"accelerate launch: {whose} {asked} processes, accelerate runs {accelerator.num_processes}; on a CPU, "
                "ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/cpu_ddp.yaml starts two"
            )
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"accelerate launch: asked for {engine}; this script shares weights out by itself: --train.shard full "
                "with accelerate_configs/multi_gpu.yaml"
            )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
        raise InputError(f"accelerate launch: asked for torch.compile ({backend}); --train.compile does that here")
    if accelerator.mixed_precision not in MIXED_PRECISION.values():
        raise InputError(f"accelerate launch: asked for {accelerator.mixed_precision}; there is fp32, fp16 and bf16")
    config.check_split(accelerator.num_processes)
    config.train.check_shards(accelerator.num_processes, accelerator.mixed_precision)
    asked = MIXED_PRECISION[config.train.precision]
    if asked not in (None, accelerator.mixed_precision):
        raise InputError(f"train.precision: asked for {asked}, accelerate runs with {accelerator.mixed_precision}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would run without autocast, and fail at the first half-precision tensor
        raise InputError("train.precision: fp16 needs a GPU; a CPU has bf16 and fp32")
    check_installed(config.needed_packages())


def pause_at_exit(accelerator: Accelerator) -> None:
    """Give the threads of torch's process group a moment at exit, by whichever way this process ends.

    A thread of gloo lets go of the last tensors shortly after the collective has returned. If Python ends between the
    two, that thread aborts the process, and a run that finished is reported as failed (pytorch/pytorch#190489). DDP
    keeps the group alive past destroy_process_group, so that nothing else waits for these threads."""
    if accelerator.num_processes > 1:
        atexit.register(time.sleep, 0.2)
