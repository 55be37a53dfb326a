"""How the denoiser computes, whatever its family: what makes a step faster or smaller and leaves its formulas as they
are (see docs/performance.md), and a look at what it computes on the way."""

from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import PreTrainedModel

from difftrain_utils.config.training import TrainConfig
from difftrain_utils.errors import InputError, blame, one_line
from difftrain_utils.optimization.sharding import blocks_of

RECOMPILE_LIMIT = 64  # graphs of one function: shapes × (training, and DREAM's probe without gradients)


def configure_denoiser(config: TrainConfig, denoiser: torch.nn.Module) -> None:
    """Lay out and compile the denoiser as `train.gradient_checkpointing`, `train.plain_attention`,
    `train.channels_last` and `train.compile` say, in place: names of parameters stay, and what is saved is contiguous
    as ever.

    Raises:
        InputError: the denoiser cannot be laid out so, or has no repeated blocks to compile.
    """
    name = type(denoiser).__name__
    if config.gradient_checkpointing:
        with blame(f"train.gradient_checkpointing: not for a {name}", ValueError):
            enable_gradient_checkpointing(denoiser)
    if config.plain_attention:
        processors = getattr(denoiser, "attn_processors", {}).values()
        if not processors or not all(isinstance(processor, AttnProcessor2_0) for processor in processors):
            raise InputError(f"train.plain_attention: not for a {name}, whose attention is not diffusers' plain one")
        denoiser.set_attn_processor(AttnProcessor())
    if config.channels_last:
        # of convolutions' weights; what they put out follows
        torch.nn.Module.to(denoiser, memory_format=torch.channels_last)
    if config.compile is None:
        return
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on uncompiled without a word
    # A graph for each shape, whatever came before it: a resumed run may begin with another shape.
    options = {"dynamic": False}
    if config.compile == "whole":
        denoiser.compile(**options)
    elif isinstance(denoiser, PreTrainedModel):
        for block in blocks_of(denoiser):
            block.compile(fullgraph=True, **options)
    else:
        try:
            denoiser.compile_repeated_blocks(fullgraph=True, **options)
        except ValueError as error:
            raise InputError(f"train.compile: regional is not for this model: {one_line(error)}") from error


def enable_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Of a model of diffusers or transformers. Raises ValueError if it has none."""
    if not isinstance(model, PreTrainedModel):
        model.enable_gradient_checkpointing()
        return
    # transformers 5 calls it otherwise
    name = next(name for name in ("activation", "gradient") if hasattr(model, f"{name}_checkpointing_enable"))
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def hidden_states(denoiser: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """A dict that has, after each forward pass, what the modules of these names in the denoiser put out, with their
    gradients; of several tensors the last one, which of blocks that have two streams is the image's. Ask for it before
    the denoiser is wrapped, that is before `TrainState` is made; it may be compiled.

    Raises:
        InputError: there is no such module.
    """
    states: dict[str, torch.Tensor] = {}
    modules = dict(denoiser.named_modules())
    for name in names:
        if name not in modules:
            there = ", ".join(list(modules)[1:6])
            raise InputError(f"hidden states: the denoiser has no module {name!r}; it has {there}, …")

        def keep(module, inputs, output, name=name):
            if not isinstance(output, torch.Tensor):
                values = output.values() if isinstance(output, dict) else output
                *_, output = (value for value in values if isinstance(value, torch.Tensor))
            if not output.is_meta:  # where FLOPs are counted
                states[name] = output

        modules[name].register_forward_hook(keep)
    return states
