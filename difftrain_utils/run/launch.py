"""Refuse to start where what was launched is not what was asked for; end without a false failure."""

import atexit
import importlib.util
import os
import time

from accelerate import Accelerator

from difftrain_utils.config.config import MIXED_PRECISION, Config
from difftrain_utils.errors import InputError

# who says how many processes were started, innermost first: torchrun, Open MPI, other MPIs, Slurm
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


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
            raise InputError(f"accelerate launch: asked for {engine}; this script runs on one device or with DDP")
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()) != "NO":
        raise InputError(f"accelerate launch: asked for torch.compile ({backend}); --train.compile does that here")
    if accelerator.mixed_precision not in MIXED_PRECISION.values():
        raise InputError(f"accelerate launch: asked for {accelerator.mixed_precision}; there is fp32, fp16 and bf16")
    config.check_split(accelerator.num_processes)
    asked = MIXED_PRECISION[config.train.precision]
    if asked not in (None, accelerator.mixed_precision):
        raise InputError(f"train.precision: asked for {asked}, accelerate runs with {accelerator.mixed_precision}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would run without autocast, and fail at the first half-precision tensor
        raise InputError("train.precision: fp16 needs a GPU; a CPU has bf16 and fp32")
    if config.noise.immiscible and importlib.util.find_spec("scipy") is None:
        raise InputError("noise.immiscible: scipy is not installed (pip install scipy)")
    if config.evaluation.fid_features and importlib.util.find_spec("torchmetrics") is None:
        raise InputError("evaluation.fid_features: torchmetrics is not installed (pip install torchmetrics)")


def pause_at_exit(accelerator: Accelerator) -> None:
    """Give the threads of torch's process group a moment at exit, by whichever way this process ends.

    A thread of gloo lets go of the last tensors shortly after the collective has returned. If Python ends between the
    two, that thread aborts the process, and a run that finished is told as failed (pytorch/pytorch#190489). DDP keeps
    the group alive past destroy_process_group, so that nothing else waits for these threads.
    """
    if accelerator.num_processes > 1:
        atexit.register(time.sleep, 0.2)
