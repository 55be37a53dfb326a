"""Floating-point operations: how many a step takes, and how many a device could do."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.optimization.quantized import is_quantized, quantized_flops

# Dense TFLOP/s in (fp16 and bf16 with float32 sums, TF32, float32), by torch.cuda.get_device_name(). From NVIDIA's data
# sheets of H100, H200, A100, L40S and L4 (figures with sparsity halved), and its white papers of the Ada and the GA102
# architecture. The same name always means the same peak, unless somebody has lowered the power limit.
H100_SXM, H100_NVL, A100 = (989.4, 494.7, 66.9), (835.5, 417.5, 60.0), (312.0, 156.0, 19.5)
PEAK_TFLOPS = {
    "NVIDIA H200": H100_SXM,
    "NVIDIA H200 NVL": H100_NVL,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H100 PCIe": (756.0, 378.0, 51.2),
    **{f"NVIDIA A100{variant}": A100 for variant in ("-SXM4-40GB", "-SXM4-80GB", "-PCIE-40GB", " 80GB PCIe")},
    "NVIDIA L40S": (362.05, 183.0, 91.6),
    "NVIDIA L4": (121.0, 60.0, 30.3),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 35.6),
}


def peak_tflops(accelerator: Accelerator, config: TrainConfig) -> float | None:
    """The TFLOP/s that this device could do in the run's precision: `train.peak_tflops`, or of the table; None where
    neither says it."""
    if config.peak_tflops is not None or accelerator.device.type != "cuda":
        return config.peak_tflops
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(accelerator.device))
    return peaks and peaks[0 if accelerator.mixed_precision in ("bf16", "fp16") else 1 if config.tf32 else 2]


@torch.no_grad()
def training_flops(denoiser: torch.nn.Module, predict: Callable[..., Any], *inputs: Any, **more: Any) -> int:
    """FLOPs of forward and backward pass of `predict(denoiser, *inputs, **more)`: matrix products, convolutions and
    attention.

    They are counted in a forward pass on the meta device, which computes nothing and draws nothing; where values are
    asked for, such as lengths in a mask, or weights are quantised, it is a pass on the device itself, with the lengths
    of these inputs. The backward pass takes as many for the activations' gradients, and as many again for those of the
    weights, of which those that are trained get their share. What is computed once more (gradient checkpointing) or
    besides (VAE, text encoder, DREAM's probe) does not count.
    """

    def to_meta(value):
        def move(tensor: torch.Tensor) -> torch.Tensor:  # autocast, under which types may differ, is not of this device
            return tensor.to("meta", torch.float32 if tensor.is_floating_point() else None)

        return tree_map_only(torch.Tensor, move, value)

    def count(denoiser, inputs: tuple, more: dict, operations: dict | None = None) -> int:
        counter = FlopCounterMode(display=False, custom_mapping=operations)
        with torch.compiler.set_stance("force_eager"), counter:  # eager: it sees torch's own operations only
            predict(denoiser, *inputs, **more)
        return counter.get_total_flops()

    if is_quantized(denoiser):
        flops = count(denoiser, inputs, more, quantized_flops())
    else:
        state = to_meta({**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())})
        try:
            flops = count(_WithState(denoiser, state), to_meta(inputs), to_meta(more))
        except NotImplementedError:  # "no data": what torch says of a value that is asked for
            flops = count(denoiser, inputs, more)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in denoiser.parameters()]
    trained_share = sum(size for size, is_trained in sizes if is_trained) / max(1, sum(size for size, _ in sizes))
    return round((2 + trained_share) * flops)


class _WithState:
    """A module called with other parameters and buffers; all else of it is as it was."""

    def __init__(self, module: torch.nn.Module, state: dict[str, torch.Tensor]):
        self.module, self.state = module, state

    def __call__(self, *args, **kwargs) -> Any:
        return functional_call(self.module, self.state, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)
