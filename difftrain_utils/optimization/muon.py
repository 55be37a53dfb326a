"""Muon for matrices and AdamW for all else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") takes nothing
    but matrices; convolutions, norms and biases get `torch.optim.AdamW`, at the same learning rate and weight decay
    where their group has no other. With `adjust_lr_fn="match_rms_adamw"` one learning rate suits both.

    `params` are groups of parameters; `init_args` are Muon's. Raises what Muon raises for them.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **init_args: Any):
        matrices, others = [], []
        for group in params:
            for groups, is_matrix in ((matrices, True), (others, False)):
                if chosen := [parameter for parameter in group["params"] if (parameter.ndim == 2) == is_matrix]:
                    groups.append(group | {"params": chosen})
        of_both = {name: init_args[name] for name in ("lr", "weight_decay") if name in init_args}
        self.parts = [torch.optim.Muon(matrices, **init_args)] if matrices else []
        self.parts += [torch.optim.AdamW(others, **of_both)] if others else []
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.defaults = {name: value for part in reversed(self.parts) for name, value in part.defaults.items()}

    def step(self, closure: Callable | None = None) -> None:
        """A step of both; their groups and states are this one's, also after it has loaded others."""
        for part in self.parts:
            kind = "momentum" if isinstance(part, torch.optim.Muon) else "betas"
            part.param_groups = [group for group in self.param_groups if kind in group]
            part.state = self.state
            part.step()
