"""How the machine computes: what is set once, before anything is computed."""

import contextlib
import ctypes
import os

import torch

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError, one_line

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
MADV_HUGEPAGE, HUGE_PAGE = 14, 2**21  # of Linux' mman.h; bytes


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


def use_onednn(config: TrainConfig) -> None:
    """Let oneDNN multiply float32 matrices on a CPU with AVX-512: MKL, torch's choice, has AVX2 kernels for those that
    are not Intel's, which take twice as long.

    To torch that is its precision "medium", as oneDNN may round factors to bfloat16 where AMX multiplies such. So CPUs
    with AMX are left out, and those that round all the same. Attention has to be plain (`train.plain_attention`): in
    torch's fused one, oneDNN (torch 2.13) takes three times as long as MKL.
    """
    capabilities = torch.cpu.get_capabilities()
    if config.plain_attention and capabilities.get("avx512_f") and not capabilities.get("amx_tile"):
        torch.set_float32_matmul_precision("medium")
        if _multiplies_in_float32():
            return
    torch.set_float32_matmul_precision("highest")


def _multiplies_in_float32() -> bool:
    """Whether products of float32 matrices are exact that 12 bits of mantissa are enough for: bfloat16 has 8."""
    for rows, inner, columns in ((2048, 64, 512), (512, 768, 96), (96, 512, 96)):
        factors = torch.arange(rows * inner).view(rows, inner) % 31 + 2.0**11, torch.eye(inner, columns)
        if not torch.equal(factors[0] @ factors[1], (factors[0].double() @ factors[1].double()).float()):
            return False
    return True


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step, on huge pages where the system has them. By default
    it gives that of large ones back to the system, which hands it out again page by page, filled with zeros. Other
    allocators are left as they are."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**30)):
            libc.mallopt(parameter, value)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        start = -(-libc.sbrk(0) // HUGE_PAGE) * HUGE_PAGE
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**29))))  # the heap grows by that and the pad
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(libc.sbrk(0) - start), MADV_HUGEPAGE)


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
