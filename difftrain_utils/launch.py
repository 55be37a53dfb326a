"""Refuse to start where what was launched is not what was asked for."""

from accelerate import Accelerator

from difftrain_utils.config import MIXED_PRECISION, TrainConfig, check_split
from difftrain_utils.errors import InputError


def check_launch(train: TrainConfig, accelerator: Accelerator) -> None:
    """Raise InputError unless the batch splits over the processes, and the precision is asked for and possible."""
    check_split(train, accelerator.num_processes)
    asked = MIXED_PRECISION[train.precision]
    if asked not in (None, accelerator.mixed_precision):
        raise InputError(f"train.precision: asked for {asked}, accelerate runs with {accelerator.mixed_precision}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would run without autocast, and fail at the first half-precision tensor
        raise InputError("train.precision: fp16 needs a GPU; a CPU has bf16 and fp32")
