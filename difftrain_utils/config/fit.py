"""What has to fit between the sections that the config of every script has."""

from difftrain_utils.config.config import Config, Require


def check_shared(config: Config, requires: dict[str, Require]) -> None:
    """Raise InputError unless they fit."""
    data, train, model, ema = config.data, config.train, config.model, config.ema
    rule = f"is train.max_steps in other words, which is {train.max_steps}: give null for one of them"
    requires["data"](None in (data.epochs, train.max_steps), "epochs", rule)
    rule = f"must divide train.batch_size, which is {train.batch_size}"
    requires["data"](data.lanes is None or train.batch_size % data.lanes == 0, "lanes", rule)
    is_quantized = model.lora is not None and model.lora.quantization is not None
    rule = "not with model.lora.quantization; there is DDP for it, train.shard none"
    requires["train"](not (train.shard == "full" and is_quantized), "shard", rule)
    for name in ("lora", "trainable"):
        rule = f"cannot be with model.{name}: difftrain posthoc-ema makes averages of whole denoisers"
        requires["ema"](not (getattr(model, name) and ema.power_sigma_rels), "power_sigma_rels", rule)
    if train.keep_best is not None:
        check_metric(config, train.keep_best, requires["train"], "keep_best")


def check_metric(config: Config, metric: str, require: Require, field: str) -> None:
    """Raise InputError about `field`, which names a metric, unless the run's evaluations have it."""
    known = config.metrics
    require(metric in known, field, f"is another script's: here it is one of {', '.join(known)}")
    is_there, what = known[metric]
    require(bool(is_there and config.train.eval_every), field, f"needs {what}, and train.eval_every above 0")
