"""How text is masked in training, and how the loss weighs it."""

from dataclasses import dataclass
from typing import Literal

from difftrain_utils.config.config import Require


@dataclass
class MaskingConfig:
    """Which tokens are masked, and how the loss estimates the bound on the likelihood."""

    estimator: Literal["count", "time"] = "count"
    """What is drawn: how many tokens of a sample are masked (less variance), or with which probability each is."""
    schedule: Literal["linear", "cosine"] = "linear"
    """The probability of a mask at time t, of the estimator `time`: t, or sin(πt/2), which masks more. The bound is the
    same, its estimate's variance is not."""
    eps: float = 1e-3
    """The least time of the estimator `time`, in place of all below it: the weight of time t is 1/t."""
    antithetic: bool = False
    """Samples 2i and 2i + 1 of a batch mask the shares u and 1 - u: for an even train.batch_size. The shares are
    stratified over the batch in any case, which alone had the lower variance on builtin:brackets."""
    random_length_share: float = 0.0
    """The share of samples cut at a random length, for a model that is to take shorter ones (LLaDA: 0.01)."""

    def check(self, require: Require) -> None:
        has_schedule = self.estimator == "time" or self.schedule == "linear"
        require(has_schedule, "schedule", "goes with masking.estimator time: count draws no time")
        require(0 < self.eps < 1, "eps", "must be above 0 and below 1")
        require(0 <= self.random_length_share <= 1, "random_length_share", "must be between 0 and 1")
