"""The optimizer, clipping and the learning rate. The optimizer is given by its import path, so that it may be any
library's."""

import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from difftrain_utils.config.training import LrSchedulerConfig, OptimizerConfig
from difftrain_utils.errors import InputError, blame, shorten, some
from difftrain_utils.optimization.muon import MuonWithAdamW
from difftrain_utils.optimization.sharding import whole
from difftrain_utils.optimization.trained import trained_weights
from difftrain_utils.trees import to_json

ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)


def build_optimizer(config: OptimizerConfig, models: Mapping[str, torch.nn.Module]) -> torch.optim.Optimizer:
    """`class_path(groups, **init_args)`, with a group of parameters for each of the models, by its name, or several
    where `optimizer.groups` has other arguments for some of its parameters.

    Raises:
        InputError: there is no such class, it is no optimizer, or it refuses its arguments.
    """
    module_name, _, class_name = config.class_path.rpartition(".")
    with blame(f"optimizer.class_path: cannot import {config.class_path!r}", Exception):  # a module may raise anything
        cls = getattr(importlib.import_module(module_name), class_name)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"optimizer.class_path: {config.class_path!r} is not a torch.optim.Optimizer")
    allowed = list(inspect.signature(cls).parameters.values())[1:]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in allowed):
        for name in config.init_args:
            if name not in (names := [parameter.name for parameter in allowed]):
                closest = difflib.get_close_matches(name, names, n=1) or [", ".join(names)]
                raise InputError(
                    f"optimizer.init_args.{name}: {config.class_path} has no such argument; did you mean {closest[0]}?"
                )
    cls = MuonWithAdamW if cls is getattr(torch.optim, "Muon", None) else cls  # torch has it since 2.9
    with blame(f"optimizer.init_args: {config.class_path} refuses {shorten(str(config.init_args))}", *ERRORS):
        _try(cls, config.init_args)
    for pattern, options in config.groups.items():
        with blame(f"optimizer.groups: {pattern!r}: {config.class_path} refuses {shorten(str(options))}", *ERRORS):
            _try(cls, config.init_args, options)
    with blame(f"optimizer: {config.class_path}", *ERRORS):
        _check_groups(config, models)
        groups = [group for name, model in models.items() for group in _groups_of(name, model, config)]
        optimizer = cls(groups, **config.init_args)
        _check_group_options(config, optimizer)
        return optimizer


def _check_groups(config: OptimizerConfig, models: Mapping[str, torch.nn.Module]) -> None:
    """Raise InputError if a pattern of `optimizer.groups` is of no parameter; that of the default need not be."""
    names = [f"{name}.{parameter}" for name, model in models.items() for parameter in trained_weights(model)]
    for pattern in config.groups.keys() - OptimizerConfig().groups.keys():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"optimizer.groups: {pattern!r} is of no parameter; there is {some(names)}")


def _check_group_options(config: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError for an option that the optimizer does not have: it would be ignored."""
    of_default = OptimizerConfig().groups
    for pattern, options in config.groups.items():
        if of_default.get(pattern) == options:
            continue
        for name in options.keys() - optimizer.defaults.keys():
            raise InputError(
                f"optimizer.groups: {pattern!r}: {config.class_path} has no {name!r} for a group; it has "
                f"{', '.join(optimizer.defaults)}"
            )


def _groups_of(name: str, model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """What is trained of a model, by its arguments, the parameters without arguments of their own first."""
    groups: dict[str, dict[str, Any]] = {"{}": {"name": name, "params": []}}
    for parameter_name, parameter in trained_weights(model).items():
        options = {}
        for pattern, of_pattern in config.groups.items():
            if fnmatchcase(f"{name}.{parameter_name}", pattern):
                options |= of_pattern
        groups.setdefault(str(options), {"name": name, "params": [], **options})["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _try(cls: type[torch.optim.Optimizer], init_args: dict[str, Any], options: Mapping[str, Any] = {}) -> None:
    """Make a step of a small matrix and a bias, in a group with `options`: only then some optimizers say that an
    argument is wrong, or that they need more than gradients. It must have a learning rate to be scheduled, and a state
    that a checkpoint can hold."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # what some are made for
    parameters = [torch.nn.Parameter(torch.ones(*shape, device=device)) for shape in ((2, 2), (2,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    names = inspect.signature(cls).parameters
    checked = {name: value for name, value in options.items() if name in names}  # a class checks its own defaults alone
    optimizer = cls([{"name": "denoiser", "params": parameters} | options], **(init_args | checked))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    to_json(optimizer.state_dict(), {})


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, max_norms: Mapping[str, float | None]
) -> torch.Tensor:
    """Clip the gradient of each model that `max_norms` names, by itself, to this norm; None: measure it only. The loss
    scale of fp16 is taken out of all gradients before.

    Returns the largest of the norms before clipping, a number on the device: infinite or NaN if one of them is.
    """
    accelerator.unscale_gradients(optimizer)  # once: a scaler refuses to do it twice in a step
    norms = []
    for name, limit in max_norms.items():
        parameters = [p for group in optimizer.param_groups if group["name"] == name for p in group["params"]]
        norms.append(whole(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)))
    return torch.stack(norms).max()


def build_lr_scheduler(
    config: LrSchedulerConfig, optimizer: torch.optim.Optimizer, max_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate as a function of the optimizer step, up to `max_steps`. Raises InputError if it cannot begin at
    the optimizer's (a polynomial one falls to 1e-7)."""
    with blame(f"lr_scheduler.name: {config.name}", ValueError):
        return get_scheduler(
            config.name, optimizer, num_warmup_steps=config.num_warmup_steps, num_training_steps=max_steps
        )
