"""What a config is made of: sections, each a dataclass that checks itself below its fields.

Nothing in this folder imports torch, so that a typo is reported at once.
"""

import dataclasses
import math
from typing import Any, ClassVar, Protocol, get_args

import yaml

from difftrain_utils.errors import InputError

MIXED_PRECISION = {None: None, "fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # train.precision as accelerate says it

RENAMED = {  # what fields were called before
    "data.validation_dir": "data.validation_dataset",
    "scheduler.name": "scheduler.sampler",
    "noise.immiscible_batch_size": "train.group_size",
    "noise.immiscible": "noise.pairing",
}
RENAMED_VALUES = {"noise.immiscible": {False: None, True: "nearest"}}  # where they are called otherwise, too


class Require(Protocol):
    """`require(allowed, field, rule)` raises InputError about a section's field unless the value is allowed."""

    def __call__(self, allowed: bool, field: str, rule: str) -> None: ...


class Config:
    """The base of a script's config, which is a dataclass of sections.

    A section is a dataclass with a method `check(require)`, which looks at its own fields; what has to fit between
    sections, the script's config checks in `check_sections(requires)`.
    """

    EXAMPLE: ClassVar[str] = "configs/quickstart.yaml"
    """One to begin with."""

    @property
    def tells_gap(self) -> bool:
        """Whether the denoiser is told how far a step of sampling goes, as those of `train_few_step.py` are."""
        return False

    @property
    def metrics(self) -> dict[str, tuple[object, str]]:
        """Of each metric by which evaluations may be judged: whether they have it here, and what it needs."""
        return {}

    def check(self) -> None:
        """Raise InputError for the first value that is out of its range or does not fit another's."""
        requires = {}
        for field in dataclasses.fields(self):
            section = getattr(self, field.name)
            requires[field.name] = require_of(section, field.name)
            refuse_null(section, field.name)
            _refuse_no_number(section, field.name)
            section.check(requires[field.name])
        self.check_sections(requires)

    def check_sections(self, requires: dict[str, Require]) -> None:
        """Check what has to fit between sections; `requires` are their functions by the name of the section."""

    def check_split(self, num_processes: int) -> None:
        """Raise InputError unless a batch can be split over accumulation steps and processes."""

    def needed_packages(self) -> dict[str, str]:
        """The optional packages that the config asks for, by the fields that do; by "data" what reading it takes."""
        return {}

    def loaded_names(self) -> list[str]:
        """The folders, or names on the hub, of what the config loads."""
        return []

    def to_yaml(self) -> str:
        """The config with all its defaults, as `--config` reads it."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def field_names(config_class: type[Config]) -> list[str]:
    """The dotted names of all fields, in order."""
    return [f"{s.name}.{f.name}" for s in dataclasses.fields(config_class) for f in dataclasses.fields(s.type)]


def refuse_null(section, name: str) -> None:
    """Refuse null where there has to be a value, which a YAML file may have all the same."""
    for field in dataclasses.fields(section):
        if getattr(section, field.name) is None and type(None) not in get_args(field.type):
            raise InputError(f"{name}.{field.name}: must not be null")


def _refuse_no_number(section, name: str) -> None:
    """Refuse numbers that are infinite or none, or that nothing can count with."""
    for field in dataclasses.fields(section):
        if not _is_finite(value := getattr(section, field.name)):
            raise InputError(f"{name}.{field.name}: must be finite (integers below 2^63), got {value!r:.80}")


def _is_finite(value: Any) -> bool:
    """Whether all numbers in it are, and fit into what torch counts with."""
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return abs(value) < 2**63 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def require_of(section, name: str) -> Require:
    def require(allowed: bool, field: str, rule: str) -> None:
        if not allowed:
            raise InputError(f"{name}.{field}: {rule}, got {getattr(section, field)!r}")

    return require


def rename_value(old: str, value: Any) -> Any:
    """The value of the field that was called `old` as it is called today."""
    return RENAMED_VALUES.get(old, {}).get(value, value) if isinstance(value, bool) else value


def rename_fields(content: dict[str, Any]) -> dict[str, str]:
    """Give the fields of a config's content, in place, their names of today. Returns {old: new} of those it had.

    Raises:
        ValueError: it has a field under both names.
    """
    renamed = {}
    for old, new in RENAMED.items():
        (old_section, old_name), (new_section, new_name) = old.split("."), new.split(".")
        section = content.get(old_section)
        if isinstance(section, dict) and old_name in section:
            if new_name in content.setdefault(new_section, {}):
                raise ValueError(f"{old} is called {new} now, and the config has both")
            content[new_section][new_name] = rename_value(old, section.pop(old_name))
            renamed[old] = new
    return renamed
