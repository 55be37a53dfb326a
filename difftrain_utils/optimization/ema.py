"""The exponential moving average of the weights that grids and `pipeline/` use.

It has the warm-up of diffusers' `EMAModel` and equals it to float rounding; it is updated in place, without a second
set of tensors for the differences.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from difftrain_utils.config.training import EmaConfig
from difftrain_utils.optimization.sharding import reshard
from difftrain_utils.optimization.trained import trained_parameters


def decay_at(step: int, decay: float) -> float:
    """How much of the average step `step` ≥ 1 keeps: min(decay, (1 + s) / (10 + s)) with s = step - 1, but 0 at the
    first step, as in diffusers."""
    return 0.0 if step <= 1 else min(decay, step / (9 + step))


class EMA:
    """`averages`, a list beside the parameters: on their device, or with `ema.on_cpu` in main memory.

    With `ema.update_every` n, it takes in the weights of every n-th step, and keeps the product of the decays of the n
    steps: so the average is as wide as with n = 1, and the weights of one step stand for those of n.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], config: EmaConfig):
        self.config = config
        device = "cpu" if config.on_cpu else None
        self.averages = [p.detach().to(device, copy=True) for p in parameters]
        self.stored: list[torch.Tensor] | None = None

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.Tensor], global_step: int) -> None:
        """Take in the parameters after optimizer step `global_step`, counted from 1, if it is due."""
        every = self.config.update_every
        if global_step % every:
            return
        kept = math.prod(decay_at(step, self.config.decay) for step in range(global_step - every + 1, global_step + 1))
        if self.config.on_cpu:  # one at a time, so that main memory holds no second copy of them all
            for average, parameter in zip(self.averages, parameters, strict=True):
                average.lerp_(parameter.detach().cpu(), 1 - kept)
        else:
            torch._foreach_lerp_(self.averages, list(parameters), 1 - kept)

    @torch.no_grad()
    def store(self, parameters: Iterable[torch.Tensor]) -> None:
        """Remember the parameters until `restore`."""
        self.stored = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give the parameters their averages."""
        for parameter, average in zip(parameters, self.averages, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def restore(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give the parameters what `store` remembers, and forget it."""
        for parameter, stored in zip(parameters, self.stored, strict=True):
            parameter.copy_(stored)
        self.stored = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The averages themselves, not copies, for a checkpoint, by position."""
        return {str(i): average for i, average in enumerate(self.averages)}


@contextmanager
def evaluation_weights(ema: EMA | None, *models: torch.nn.Module | None) -> Iterator[None]:
    """Give models their EMA weights (if there are any) and eval mode, for as long as the block runs. The average is of
    the `trained_parameters` of these models."""
    models = [model for model in models if model is not None]
    reshard(*models)
    parameters = trained_parameters(*models)
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    for model in models:
        model.eval()
    try:
        # other batch sizes than in training: they are not worth a compilation (train.compile) each
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model in models:
            model.train()
        reshard(*models)
        if ema is not None:
            ema.restore(parameters)
