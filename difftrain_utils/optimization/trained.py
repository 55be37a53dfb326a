"""Which weights of a model are trained. The others are frozen: no optimizer, no average and no checkpoint has them."""

import torch

from difftrain_utils.optimization.quantized import quantize_frozen


def trained_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_parameters(*models: torch.nn.Module | None) -> list[torch.nn.Parameter]:
    """The same of several models, or none, without names, in the same order."""
    return [parameter for model in models if model is not None for parameter in trained_weights(model).values()]


def is_trained_whole(model: torch.nn.Module) -> bool:
    """Whether no weight is frozen."""
    return all(parameter.requires_grad for parameter in model.parameters())


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: its state dict, or where weights are frozen, only those that are trained."""
    if is_trained_whole(model):
        return model.state_dict()
    return {name: parameter.detach() for name, parameter in trained_weights(model).items()}


def saved_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same with tied weights once, by the first of their names."""
    state, names = trained_state(model), {}
    tensors = model.state_dict(keep_vars=True)
    for name in sorted(state):
        names.setdefault(id(tensors[name]), name)  # tied ones are one parameter
    return {name: state[name] for name in names.values()}


def round_frozen(model: torch.nn.Module, dtype: torch.dtype, quantization: str | None = None) -> None:
    """Keep frozen weights of a model that is trained in part in `dtype`, in place, and those of linear layers in fewer
    bits (`quantize_frozen`). Adapters stay as they are, also frozen ones, and so do vectors, which are small: some
    norms want scale and shift of one dtype, of which one may be trained."""
    if is_trained_whole(model):
        return
    for name, parameter in model.named_parameters():
        is_base = not parameter.requires_grad and ".lora_" not in name
        if is_base and parameter.is_floating_point() and parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)
    if quantization is not None:
        quantize_frozen(model, quantization, dtype)
