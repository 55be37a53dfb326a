"""What an entry of a table of foreign flags is, and how their values are read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difftrain_utils.errors import InputError

NULL = object()  # a field's null, where None leaves its default
Flags = Mapping[str, Any]  # all that is given, over the source's own defaults; from a command line they are strings


class Dropped(Exception):
    """This value of a flag has no counterpart; says why."""


def as_it_is(value: Any, flags: Flags) -> Any:
    """Text, or what a file has."""
    return value


def number(value: Any, flags: Flags | None = None) -> int | float:
    """A number from text. Raises ValueError if it is none."""
    if not isinstance(value, str):
        return value + 0
    try:
        return int(value)
    except ValueError:
        return float(value)


def decimal(value: Any, flags: Flags | None = None) -> float:
    """A number that may be a fraction."""
    return float(number(value))


def switch(value: Any, flags: Flags | None = None) -> bool:
    """True of a flag without a value."""
    return value is True or str(value).lower() in ("true", "1", "yes")


def texts(value: Any, flags: Flags | None = None) -> list[str]:
    """One or several."""
    return [str(text) for text in (value if isinstance(value, list) else [value])]


def with_another(value: Any, flags: Flags) -> None:
    """The value counts where that of another flag is read."""


def only_if(allowed: Any, reason: str) -> Callable[[Any, Flags], None]:
    """Of a flag that has no field: a value that does nothing says nothing, and any other is dropped."""

    def convert(value: Any, flags: Flags) -> None:
        read = {bool: switch, str: str}.get(type(allowed), number)
        if read(value) != allowed:
            raise Dropped(reason)

    return convert


def one_of(choices: Mapping[str, Any], reason: str) -> Callable[[Any, Flags], Any]:
    """Each of some values has its own counterpart."""

    def convert(value: Any, flags: Flags) -> Any:
        if str(value).lower() not in choices:
            raise Dropped(f"{value}: {reason}")
        return choices[str(value).lower()]

    return convert


class Ours(NamedTuple):
    """A field, or several with commas, and `convert(value, flags)`: its value, or {field: value} of several; None
    leaves the default, and NULL is null. It raises Dropped for a value that has no counterpart, and ValueError for one
    that is none."""

    field: str
    convert: Callable[[Any, Flags], Any] = as_it_is


Table = dict[str, Ours | str]


PROCESSES = "num_processes"  # of the launch line, or `difftrain migrate --num-processes`


def batch_size(value: Any, flags: Flags) -> int:
    """Theirs is that of a process and an accumulation step, ours that of an optimizer step."""
    return number(value) * number(flags["gradient_accumulation_steps"]) * processes(flags)


def processes(flags: Flags) -> int:
    if flags[PROCESSES] is None:
        raise InputError("--num-processes: needed, for a batch is that of a process there, and nothing says how many")
    return flags[PROCESSES]


def validation_prompts(value: Any, flags: Flags) -> list[str]:
    """Each from as many noises as there are images of it."""
    return texts(value) * number(flags.get("num_validation_images", 1))


def resume(value: Any, flags: Flags) -> str:
    if value != "latest":
        raise Dropped("a checkpoint of another trainer cannot be gone on from; train.resume_from is for this one's")
    return value


def adam(value: Any, flags: Flags) -> str | None:
    if str(flags.get("optimizer", "adamw")).lower() == "prodigy":
        return None
    return "bitsandbytes.optim.AdamW8bit" if switch(value) else None


def encoders(name: str) -> Callable[[Any, Flags], dict[str, Any] | None]:
    """Another argument of the optimizer for the text encoders, where they are trained."""

    def convert(value: Any, flags: Flags) -> dict[str, Any] | None:
        if not switch(flags.get("train_text_encoder")) or "flux" in flags["script"]:
            return None
        return {"optimizer.groups": {"text_encoders.*": {name: float(number(value))}}}

    return convert


def weighting_scheme(value: Any, flags: Flags) -> dict[str, Any] | None:
    """Some are densities of timesteps, some weights of the loss (diffusers' training_utils)."""
    if value in ("logit_normal", "mode"):
        return {"timesteps.density": value}
    return None if value == "none" else {"loss.weighting": value}


def cache_latents(value: Any, flags: Flags) -> bool | None:
    if switch(value) and not switch(flags.get("center_crop")):
        raise Dropped("data.cache_latents keeps one crop of an image, and so needs data.center_crop")
    return switch(value) or None


def sharing(name: str) -> Callable[[Any, Flags], str | None]:
    """The switch of one of a field's values."""
    return lambda value, flags: name if switch(value) else None


def gamma(value: Any, flags: Flags) -> dict[str, Any] | None:
    """0 is none."""
    return {"loss.weighting": "min_snr", "loss.snr_gamma": float(number(value))} if number(value) else None


def clipping(value: Any, flags: Flags) -> Any:
    """0 is none."""
    return number(value) or NULL


def if_above_0(value: Any, flags: Flags) -> int | float | None:
    return number(value) or None


PRECISION = one_of(
    {"no": "fp32", "none": None, "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}, "fp32, fp16 and bf16 are here"
)
TRACKERS = one_of(
    {name: name for name in ("tensorboard", "wandb", "comet_ml", "mlflow")} | {"none": None},
    "name the trackers, as train.report_to has them",
)
HUB = "nothing is pushed while training; difftrain push does it after"
LAUNCHER = "the launcher says it"
ALWAYS = "always so here"
FUSED = "torch's own fused attention is used"
