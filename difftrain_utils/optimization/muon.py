"""Muon for matrices and AdamW for all else, as one optimizer."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") takes nothing
    but matrices; convolutions, norms and biases get `torch.optim.AdamW`, at the same learning rate and weight decay
    where their group has no other. With `adjust_lr_fn="match_rms_adamw"` one learning rate suits both.

    `params` are groups of parameters, whose arguments may be either optimizer's; `init_args` are Muon's. Raises what
    the two raise for them.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **init_args: Any):
        muon = {name: p.default for name, p in inspect.signature(torch.optim.Muon).parameters.items()} | init_args
        own = {torch.optim.Muon: muon, torch.optim.AdamW: {name: muon[name] for name in ("lr", "weight_decay")}}
        self.parts, groups = {}, []
        for group in params:
            for cls, arguments in own.items():
                known = inspect.signature(cls).parameters.keys() - {"params"}
                chosen = [p for p in group["params"] if (p.ndim == 2) == (cls is torch.optim.Muon)]
                if chosen:
                    part = cls(chosen, **{n: value for n, value in (arguments | group).items() if n in known})
                    self.parts.setdefault(cls.__name__, part)
                    groups.append(part.param_groups[0] | {"name": group["name"], "optimizer": cls.__name__})
        super().__init__(groups, {})
        self.defaults = {name: value for part in self.parts.values() for name, value in part.defaults.items()}

    def step(self, closure: Callable | None = None) -> None:
        """A step of both; their groups and states are this one's, also after it has loaded others."""
        for name, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.state = self.state
            part.step()
