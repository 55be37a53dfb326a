"""How the machine computes: what is set once, before anything is computed."""

import contextlib
import ctypes
import os

import torch

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError, one_line

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def set_deterministic() -> None:
    """Let torch use deterministic algorithms only. Call it before CUDA starts: cuBLAS reads its variable then."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def set_tf32(config: TrainConfig, device: torch.device) -> None:
    """Let an NVIDIA GPU round the factors of float32 products and convolutions to TF32 (10 bits of mantissa), or not.

    Torch's own default is to do so in convolutions alone.

    Raises:
        InputError: `train.tf32` on a device that has no TF32.
    """
    if device.type != "cuda":
        if config.tf32:
            raise InputError(f"train.tf32: needs an NVIDIA GPU, the device is {device.type}")
        return
    if config.tf32 and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(f"train.tf32: {torch.cuda.get_device_name(device)} has no TF32 (Ampere and newer have)")
    # the older names of these switches: torch refuses to read them once their newer ones were set
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step. By default it gives that of large ones back to the
    system, which hands it out again page by page, filled with zeros. Other allocators are left as they are."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


def check_compile(config: TrainConfig, device: torch.device) -> None:
    """Raise InputError unless torch.compile works on the device: it needs a C++ compiler, or Triton on a GPU.

    On a CPU it shall not choose layouts of its own: with torch 2.13 in bf16 and `whole` the gradients were wrong then,
    and zero for more than half of the builtin model's parameters."""
    if config.compile is None:
        return
    if device.type == "cpu":
        torch._inductor.config.layout_optimization = False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, of any layer of the compiler
        raise InputError(f"train.compile: torch.compile does not work on this machine: {one_line(error)}") from error
