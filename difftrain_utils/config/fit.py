"""What has to fit between the sections that the config of every script has."""

from difftrain_utils.config.config import Config, Require


def check_shared(config: Config, best: dict[str, tuple[object, str]], requires: dict[str, Require]) -> None:
    """Raise InputError unless they fit. `best` says of each metric that `train.keep_best` may name here whether there
    is one, and what it needs."""
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
        is_there, what = best.get(train.keep_best, (False, f"another script: here it is one of {', '.join(best)}"))
        rule = f"needs {what}, and train.eval_every above 0"
        requires["train"](bool(is_there and train.eval_every), "keep_best", rule)
