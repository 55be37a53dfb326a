"""Floating-point operations: how many a step takes, and how many a device could do."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.optimization.quantized import is_quantized, quantized_flops
from difftrain_utils.run.gpus import PEAK_TFLOPS, peak_of

RECOUNT = 100  # steps
OPERATIONS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}


def peak_tflops(accelerator: Accelerator, config: TrainConfig) -> float | None:
    """The TFLOP/s that this device could do in the run's precision: `train.peak_tflops`, or of the table; None where
    neither says it."""
    if config.peak_tflops is not None or accelerator.device.type != "cuda":
        return config.peak_tflops
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(accelerator.device))
    return peaks and peak_of(peaks, accelerator.mixed_precision, config.tf32)


def training_flops(denoiser: torch.nn.Module, predict: Callable[..., Any], *inputs: Any, **more: Any) -> int | None:
    """FLOPs of forward and backward pass of `predict(denoiser, *inputs, **more)`, a tensor: matrix products,
    convolutions and attention.

    Both passes are made on the meta device, which computes nothing and draws nothing; what frozen weights spare does
    not count. Where values are asked for, such as lengths in a mask, or weights are quantised, there is a forward pass
    alone, on the device itself, with the lengths of these inputs (on a CPU torch does not count its own kernel of
    attention). The backward pass then takes as many for the activations' gradients, and as many again for those of the
    weights, of which those that are trained get their share: too many where the first layers are frozen. What is
    computed once more (gradient checkpointing) or besides (VAE, text encoder, DREAM's probe) does not count.

    None where values are asked for and the denoiser has none, as with `train.shard`.
    """

    def to_meta(value):
        def move(tensor: torch.Tensor) -> torch.Tensor:  # autocast, under which types may differ, is not of this device
            moved = tensor.detach().to("meta", torch.float32 if tensor.is_floating_point() else None)
            return moved.requires_grad_(tensor.requires_grad)

        return tree_map_only(torch.Tensor, move, value)

    def count(denoiser, inputs: tuple, more: dict, operations: dict | None = None) -> int:
        counter = FlopCounterMode(display=False, custom_mapping=operations)
        with torch.compiler.set_stance("force_eager"), counter:  # eager: it sees torch's own operations only
            output = predict(denoiser, *inputs, **more)
            if torch.is_grad_enabled():
                output.sum().backward()
        return counter.get_total_flops()

    if not is_quantized(denoiser):
        state = to_meta({**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())})
        try:
            with torch.enable_grad(), without_checkpointing(denoiser):
                return count(_WithState(denoiser, state), to_meta(inputs), to_meta(more))
        except RuntimeError:  # what torch says of a value that is asked for; it may be a NotImplementedError
            if any(parameter.is_meta for parameter in denoiser.parameters()):
                return None
    with torch.no_grad():
        flops = count(denoiser, inputs, more, quantized_flops() if is_quantized(denoiser) else None)
    # a byte holds two weights of 4 bits
    sizes = {p: p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in denoiser.parameters()}
    trained_share = sum(size for p, size in sizes.items() if p.requires_grad) / max(1, sum(sizes.values()))
    return round((2 + trained_share) * flops)


class OperationCounter(TorchDispatchMode):
    """Counts the FLOPs of all that is computed while it is on, in the backward pass, too: as torch's FlopCounterMode
    does, but of a CPU's own kernel of attention as well, and without what changes the last bits there. It sees what
    torch.compile has left as torch's own operations: nearly all products."""

    supports_higher_order_operators = True  # those by which compiled code draws the same random numbers once more

    def __init__(self):
        super().__init__()
        self.total, self.is_paused = 0, False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled is compiled as without it."""
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        flops_of = OPERATIONS.get(getattr(operation, "_overloadpacket", operation))
        if flops_of is not None and not self.is_paused:
            self.total += flops_of(*args, **(kwargs or {}), out_val=output)
        return output


class StepFlops:
    """The FLOPs of a run's steps so far, of all processes and of all that is between two batches: VAE, text encoders,
    probes, teachers, what checkpointing computes once more. The update, which is after the last of them, is not
    counted: of Muon it is products, too.

    Counted are the parts of each `RECOUNT`-th step, and those whose tensors have other shapes than any before; the rest
    are taken to need as many as the last of their shapes, also where it depends on values (each different caption is
    encoded once). So a part that later costs more than it did (DREAM from some step on) counts as such from the next
    `RECOUNT`-th step on. So are the parts of other processes, which have the same shapes.
    """

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.total: int | None = 0  # None: there are steps of which it is not known
        self.of_step = 0  # which may not end
        self.of_shapes: dict[str, int] = {}  # of one process
        self.counter: OperationCounter | None = None

    @contextlib.contextmanager
    def part(self, batch: dict[str, Any], step: int) -> Iterator[None]:
        """Count what the block does with a part of a step's batch."""
        shapes = str([tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)])
        if self.total is None or (step % RECOUNT and shapes in self.of_shapes):
            yield
        else:
            with OperationCounter() as self.counter:
                yield
            self.of_shapes[shapes], self.counter = self.counter.total, None
        if self.total is not None:
            self.of_step += self.of_shapes[shapes] * self.num_processes

    def end_step(self) -> None:
        """A step is done."""
        if self.total is not None:
            self.total += self.of_step
        self.of_step = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the block computes."""
        if self.counter is not None:
            self.counter.is_paused = True
        yield
        if self.counter is not None:
            self.counter.is_paused = False

    def state(self) -> dict[str, Any]:
        """What `load_state` goes on from."""
        return {"total": self.total, "of_shapes": self.of_shapes}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """None: of a version that did not count."""
        state = state or {"total": None, "of_shapes": {}}
        self.total, self.of_shapes = state["total"], dict(state["of_shapes"])


def flops_of_shapes(shapes: AbstractContextManager, function: Callable[..., Any], *inputs: Any) -> int:
    """FLOPs of `function(*inputs)` on tensors without values (`activations.Shapes`), and of the backward pass where
    gradients are on. Attention is that of separate products: torch does not count a CPU's own kernel."""
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), shapes, sdpa_kernel(SDPBackend.MATH), counter:
        output = function(*inputs)
        if torch.is_grad_enabled():
            output.sum().backward()
    return counter.get_total_flops()


@contextlib.contextmanager
def without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """Without gradient checkpointing, and then with it as it was, so that nothing is compiled anew."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


class _WithState:
    """A module called with other parameters and buffers; all else of it is as it was."""

    def __init__(self, module: torch.nn.Module, state: dict[str, torch.Tensor]):
        self.module, self.state = module, state

    def __call__(self, *args, **kwargs) -> Any:
        return functional_call(self.module, self.state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)
