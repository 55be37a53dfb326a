"""What differs between a CPU and a GPU."""

import gc
import resource
import sys

import torch


def weight_dtype(precision: str) -> torch.dtype:
    """What weights that are not trained are kept in: the precision of the run, "fp16", "bf16", or else float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def to_device(numbers: torch.Tensor, device=None) -> torch.Tensor:
    """Move CPU numbers. A GPU fetches them from pinned memory when it comes to it, so that the CPU need not wait."""
    if device is not None and torch.device(device).type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def seed_device(seed: int, device: torch.device) -> None:
    """torch.manual_seed of the CPU and of one device: it takes longer to seek out all there might be."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3`, say; `cpu` and others by their type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """The most bytes that torch had of the GPU, or that the process had of main memory, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def memory_of_training() -> str:
    """What the optimizers of this process hold, in 10⁹ bytes: trained weights, gradients and their own state."""
    held = {"trained weights": {}, "gradients": {}, "optimizer state": {}}  # by address, as wrappers hold them again
    for optimizer in [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [value for parameter in parameters for value in optimizer.state.get(parameter, {}).values()]
        for name, tensors in zip(held, (parameters, [p.grad for p in parameters], states), strict=True):
            held[name] |= {id(tensor): tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return ", ".join(f"{name} {sum(sizes.values()) / 1e9:.3g} GB" for name, sizes in held.items())
