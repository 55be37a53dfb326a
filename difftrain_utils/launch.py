"""Refuse to start where what was launched is not what was asked for."""

import importlib.util

from accelerate import Accelerator

from difftrain_utils.config import MIXED_PRECISION, Config, check_immiscible, check_split
from difftrain_utils.errors import InputError


def check_launch(config: Config, accelerator: Accelerator) -> None:
    """Raise InputError unless the batch splits over the processes and what the config asks for is possible here."""
    check_split(config.train, accelerator.num_processes)
    check_immiscible(config, accelerator.num_processes)
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
