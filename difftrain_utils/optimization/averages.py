"""The averages of the weights that a run keeps."""

from collections.abc import Iterable

import torch

from difftrain_utils.config.training import EmaConfig
from difftrain_utils.optimization.ema import EMA
from difftrain_utils.optimization.power_ema import PowerEMA

AVERAGES = {"ema", "power_ema"}
Averages = dict[str, EMA | PowerEMA]


def build_averages(config: EmaConfig, parameters: Iterable[torch.Tensor]) -> Averages:
    """Those that `ema.enabled` ("ema") and `ema.power_sigma_rels` ("power_ema") ask for, by name."""
    parameters, averages = list(parameters), {}
    if config.enabled:
        averages["ema"] = EMA(parameters, config)
    if config.power_sigma_rels:
        averages["power_ema"] = PowerEMA(parameters, config.power_sigma_rels)
    return averages
