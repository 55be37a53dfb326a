"""An optimizer from its import path, so that any library's optimizer can be named in a config."""

import difflib
import importlib
import inspect
from collections.abc import Iterable

import torch

from difftrain_utils.config.training import OptimizerConfig
from difftrain_utils.errors import InputError, blame


def build_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """`class_path(parameters, **init_args)`.

    Raises:
        InputError: there is no such class, it is no optimizer, or it refuses its arguments.
    """
    module_name, _, class_name = config.class_path.rpartition(".")
    with blame(f"optimizer.class_path: cannot import {config.class_path!r}", ImportError, AttributeError, ValueError):
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
    with blame(
        f"optimizer.init_args: {config.class_path} refuses {config.init_args}", TypeError, ValueError, RuntimeError
    ):
        return cls(parameters, **config.init_args)
