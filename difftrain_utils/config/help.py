"""What `--help` prints: all fields in a line or two each, or all about a section or a field."""

import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import docstring_parser

from difftrain_utils.config.config import Config
from difftrain_utils.config.model import LoraConfig
from difftrain_utils.config.training import SeedsConfig
from difftrain_utils.errors import InputError

NESTED = {"model.lora": LoraConfig, "train.seeds": SeedsConfig}  # fields that have fields of their own
COLUMN = 30  # where the text begins
OPTIONS = {
    "--config FILE": "A YAML file of the fields below; the command line wins over it.",
    "--output-dir FOLDER": "Short for --train.output_dir.",
    "--resume-from latest": "Short for --train.resume_from.",
    "--print_config": "Print the YAML of all fields as they would be, and stop.",
    "--print_shtab SHELL": "Print a script of completions for bash, zsh or tcsh, and stop.",
    "--help [SECTION or FIELD]": "This page, or all about a section or a field, such as --help train.",
}


class Field(NamedTuple):
    """A field of a config: `name` is dotted, `text` its docstring in one line."""

    name: str
    kind: Any
    default: Any
    text: str


def sections(config_class: type[Config]) -> dict[str, tuple[str, list[Field]]]:
    """What each section is, and its fields; those of a field come as a section after the one that has it."""
    found = {}
    for section in dataclasses.fields(config_class):
        found[section.name] = describe(section.name, section.type)
        for name, cls in NESTED.items():
            if name.startswith(f"{section.name}."):
                found[name] = describe(name, cls)
    return found


def help_text(config_class: type[Config], topic: str | None, prog: str, about: str) -> str:
    """The page of `--help`, as wide as the terminal, or that of `--help TOPIC`, a section or a field.

    Raises:
        InputError: there is no such section or field.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    found = sections(config_class)
    fields = {field.name: field for _, of_section in found.values() for field in of_section}
    if topic is None:
        lines = [f"usage: {prog} --config FILE [--SECTION.FIELD VALUE ...]"]
        lines += [line for paragraph in about.strip().split("\n\n") for line in ("", *wrap(paragraph, width))] + [""]
        lines += [line for option, text in OPTIONS.items() for line in _row(option, text, width)]
        for name, (title, of_section) in found.items():
            lines += ["", *wrap(f"{name}: {title}", width)]
            for field in of_section:
                lines += _row(f"--{field.name}", _first_sentence(field.text) + _default(field), width)
        return "\n".join(lines)
    if topic in found:
        title, of_section = found[topic]
        return "\n\n".join([f"{topic}: {title}", *(_whole(field, width) for field in of_section)])
    if topic in fields:
        return _whole(fields[topic], width)
    raise InputError(f"--help {topic}: no such section or field; there is {', '.join(found)}, and their fields")


def kind_name(kind: Any) -> str:
    """A type as a user would say it: `a|b` of literals, `integer or null`."""
    names = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "null"}
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(dict.fromkeys(map(kind_name, get_args(kind))))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"[{kind_name(get_args(kind)[0])}, ...]"
    if get_origin(kind) is dict:
        return "{name: value, ...}"
    return names.get(kind, "{field: value, ...}")


def choices(kind: Any) -> list[str]:
    """The values that a field of this type may have, where they are few."""
    name = kind_name(kind).replace(" or ", "|")
    known = re.fullmatch(r"[\w|]+", name) and not {"integer", "number", "text"} & set(name.split("|"))
    return name.split("|") if known else []


def describe(name: str, cls: type) -> tuple[str, list[Field]]:
    """What a dataclass of fields is, and its fields, under a dotted name."""
    docs = [docstring_parser.parse_from_object(base) for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    params = [param for doc in reversed(docs) for param in doc.params]
    texts = {param.arg_name: " ".join(param.description.split()) for param in params}
    return " ".join(docs[0].description.split()), list(_fields(name, cls, texts))


def _fields(name: str, cls: type, texts: dict[str, str]) -> Iterator[Field]:
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield Field(f"{name}.{field.name}", field.type, default, texts.get(field.name, ""))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[^.]{2}\.) (?=[A-Z`])", text)[0]


def _default(field: Field) -> str:
    if field.default is dataclasses.MISSING:
        return " [needed]"
    shown = field.default if isinstance(field.default, str) else json.dumps(field.default)
    return "" if field.default in (None, "", [], {}) else f" [{shown}]"


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """The lines of a paragraph; of one that is set in they stay as they are."""
    if text.startswith(" "):
        return text.splitlines()
    options = {"initial_indent": indent, "subsequent_indent": indent}
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False, **options)


def _row(option: str, text: str, width: int) -> list[str]:
    lines = wrap(text, max(width, COLUMN + 20), " " * COLUMN)
    if len(option) > COLUMN - 4:
        return [f"  {option}", *lines]
    return [f"  {option}".ljust(COLUMN) + lines[0][COLUMN:], *lines[1:]]


def _whole(field: Field, width: int) -> str:
    facts = f"--{field.name}  {kind_name(field.kind)}{_default(field)}"
    return "\n".join([facts, *wrap(field.text, width, "    ")])
