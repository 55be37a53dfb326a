"""Frozen linear layers in 8 or 4 bits: bitsandbytes' LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) and QLoRA's
NormalFloat with its constants quantised, too (Dettmers et al. 2023, arXiv:2305.14314).

They are the layers of diffusers' `BitsAndBytesConfig`, which itself needs a GPU and quantises while loading: then the
digest of the checkpoint's weights could not be taken, nor the adapters merged into them."""

import logging
from collections.abc import Callable, Iterator

import torch

BLOCK, BLOCKS = 64, 256  # weights that share a constant in nf4, and constants that share one
OUTLIER = 6.0  # LLM.int8() multiplies features of the input above it in 16 bits; diffusers' own


def frozen_linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The layers that can be quantised, by name; adapters, of which some may be frozen, too, are not."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not module.weight.requires_grad and ".lora_" not in name:
            yield name, module


def quantize_frozen(model: torch.nn.Module, quantization: str, dtype: torch.dtype) -> None:
    """Put quantising layers, which compute in `dtype`, in the place of frozen linear ones. Each rounds its weight when
    the model is brought onto the device, so that this never holds the whole of it."""
    import bitsandbytes  # an extra

    # of each product, that its input is rounded to 16 bits
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, layer in frozen_linears(model):
        shape = {"input_features": layer.in_features, "output_features": layer.out_features}
        options = {**shape, "bias": layer.bias is not None, "device": "meta"}
        if quantization == "nf4":
            new = bitsandbytes.nn.Linear4bit(**options, compute_dtype=dtype, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, quant_type="nf4", module=new)
            new.support_avx512bf16_for_cpu = False  # after an evaluation there would be no gradient any more
        else:
            new = bitsandbytes.nn.Linear8bitLt(**options, has_fp16_weights=False, threshold=OUTLIER)
            new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        # as autocast would; else what they put out is of the type of what they are given
        new.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype),))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.train(layer.training))


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `quantize_frozen` was here."""
    return not all(parameter.is_floating_point() for parameter in model.parameters())


def quantized_bytes(layer: torch.nn.Linear, quantization: str) -> int:
    """Of such a layer's weight, with its constants."""
    size = layer.weight.numel()
    if quantization == "int8":
        return size + 4 * layer.out_features
    blocks = -(-size // BLOCK)
    return -(-size // 2) + blocks + 4 * -(-blocks // BLOCKS) + 4 * (16 + 256 + 1)  # with the two tables of values


def quantized_flops() -> dict[object, Callable[..., int]]:
    """FLOPs of the quantised layers' own operations, as torch's `FlopCounterMode` takes them."""
    import bitsandbytes  # noqa: F401  brings the operations

    def product(inputs: torch.Size, outputs: int) -> int:
        return 2 * inputs.numel() * outputs

    ops = torch.ops.bitsandbytes
    return {
        ops.gemm_4bit: lambda inputs, weight, shape, *args, **kwargs: product(inputs, shape[0]),
        ops.int8_scaled_mm: lambda inputs, weight, *args, **kwargs: product(inputs, weight[0]),
        ops.int8_mixed_scaled_mm: lambda inputs, rounded, weight, *args, **kwargs: product(rounded, weight[0]),
    }
