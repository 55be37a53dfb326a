"""What of a denoiser is trained: all of it, some of its weights, or low-rank adapters (Hu et al. 2021,
arXiv:2106.09685), which are peft's."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors.torch import save_file

from difftrain_utils.config.model import LoraConfig, ModelConfig
from difftrain_utils.errors import InputError, blame, some
from difftrain_utils.keyed_random import seed_for
from difftrain_utils.optimization.trained import trained_weights

ADAPTER = "default"  # peft's and diffusers' name of the only one
INITS = {"gaussian": "gaussian", "kaiming": True}


def choose_trained(denoiser: torch.nn.Module, config: ModelConfig, targets: Sequence[str], seed: int) -> None:
    """Freeze, in place, what `model.trainable` leaves out, and give the denoiser the adapters of `model.lora`. What the
    family has frozen stays so.

    Raises:
        InputError: a pattern is of no weight, or there are no such layers.
    """
    patterns, weights = config.trainable, dict(denoiser.named_parameters())
    for pattern in patterns or ():
        of_pattern = [weight for name, weight in weights.items() if fnmatchcase(name, pattern)]
        if not of_pattern:
            raise InputError(f"model.trainable: {pattern!r} is of no weight; there is {some(list(weights))}")
        if not any(weight.requires_grad for weight in of_pattern):
            raise InputError(f"model.trainable: {pattern!r} is of weights that nothing depends on, which stay frozen")
    if patterns is None and config.lora is None:
        return
    trained = [
        weight
        for name, weight in weights.items()
        if weight.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns or ())
    ]
    if config.lora is not None:
        layers = list(dict(denoiser.named_modules()))
        for target in config.lora.target_modules or ():
            if not any(f".{layer}".endswith(f".{target}") for layer in layers):
                name = type(denoiser).__name__
                raise InputError(f"model.lora.target_modules: a {name} has no layer {target!r}; try {some(targets)}")
        add_adapters(denoiser, config.lora, config.lora.target_modules or targets, seed)
    else:
        denoiser.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)


def add_adapters(
    model: torch.nn.Module, config: LoraConfig, targets: Sequence[str], seed: int, number: int = 2
) -> None:
    """Give a model adapters, in place; its own weights are frozen. The adapters are float32 and a function of the seed
    and the `number` of the model, and add nothing before they are trained. Layers that are frozen already get none:
    nothing depends on them.

    Raises:
        InputError: it has no such layers, or they take no adapters.
    """
    import peft  # an extra

    modules = {name: list(module.parameters()) for name, module in model.named_modules() if name}
    frozen = [name for name, own in modules.items() if own and not any(weight.requires_grad for weight in own)]
    own = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=list(targets),
        exclude_modules=frozen or None,
        init_lora_weights=INITS[config.init],
        lora_dropout=config.dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    field = "model.lora" if config.target_modules is None else "model.lora.target_modules"
    with blame(f"{field}: not for a {type(model).__name__}", ValueError, TypeError), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights", number))
        peft.inject_adapter_in_model(own, model, ADAPTER)
    model._hf_peft_config_loaded = True  # as a model's own add_adapter, which not all have, leaves it


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return bool(getattr(model, "peft_config", None))


def trains_adapters_alone(model: torch.nn.Module) -> bool:
    """Whether the model's own weights are those that it had before training."""
    return all(".lora_" in name for name in trained_weights(model))


def base_state(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the denoiser as it is without adapters."""
    if not has_adapters(denoiser):
        return denoiser.state_dict()
    state = denoiser.state_dict().items()
    return {name.replace(".base_layer", ""): value for name, value in state if ".lora_" not in name}


def save_adapters(folder: Path, parts: Mapping[str, torch.nn.Module]) -> None:
    """Write into the folder what the `save_lora_weights` of diffusers' pipelines writes, and they load, of the parts
    that are called so there: the adapters' weights and, without which alpha would be lost, their config. Equal adapters
    are equal bytes: safetensors puts several fields of metadata in any order, and so does Python the elements of a
    set."""
    from peft.utils import get_peft_model_state_dict

    tensors, config = {}, {}
    for part, model in parts.items():
        state = get_peft_model_state_dict(model)
        tensors |= {f"{part}.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        own = model.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}  # diffusers would load it in training mode
        config |= {f"{part}.{name}": value for name, value in own.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True, default=sorted)}
    save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata)


def save_peft_adapters(folder: Path, model: torch.nn.Module, base: str) -> None:
    """Write into the folder the adapters of a model, whose checkpoint is called `base`, as peft's own models do: as
    `PeftModel.from_pretrained` loads them. Equal adapters are equal bytes."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    own = {"base_model_name_or_path": base, "inference_mode": True, "lora_dropout": 0.0}
    config = model.peft_config[ADAPTER].to_dict() | own
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n")


def with_trained(base: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """`base`, the model as it was before training, with what was trained of `model`: its weights, and its adapters
    merged into them, in float32; in place."""
    trained = {name: weight.detach().cpu() for name, weight in trained_weights(model).items()}
    if has_adapters(model):
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        inject_adapter_in_model(model.peft_config[ADAPTER], base, ADAPTER)
        base.load_state_dict(trained, strict=False)
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent, _, last = name.rpartition(".")
                setattr(base.get_submodule(parent), last, module.get_base_layer())
        del base.peft_config
    else:
        base.load_state_dict(trained, strict=False)
    return base
