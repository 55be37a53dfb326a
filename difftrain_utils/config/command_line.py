"""A config from a YAML file (`--config FILE`) and the command line, where any field has its dotted name
(`--train.max_steps 200`)."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from difftrain_utils.config.completion import add_fields, check_installed, completion
from difftrain_utils.config.config import RENAMED, RENAMED_VALUES, Config, field_names, rename_fields, rename_value
from difftrain_utils.config.foreign import sources as foreign
from difftrain_utils.config.help import NESTED, help_text
from difftrain_utils.config.hub import use_cache_without_network
from difftrain_utils.config.scripts import SCRIPTS
from difftrain_utils.config.training import OptimizerConfig
from difftrain_utils.errors import InputError, blame, shorten, warn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LENGTHS = ("--data.epochs", "--train.max_steps")  # of a run: one on the command line takes the place of both in a file
ALIASES = {"--output-dir": "--train.output_dir", "--resume-from": "--train.resume_from"}

C = TypeVar("C", bound=Config)
SHORT = {"lr": "optimizer.init_args.lr", "learning_rate": "optimizer.init_args.lr"}


class _Lost(yaml.MarkedYAMLError):
    """What would be lost in silence."""


class StrictLoader(yaml.SafeLoader):
    """YAML without what is lost in silence: of two keys the first, of 010 that it is 8, and of 1:30 that it is 90."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise _Lost(problem=f"{name!r} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        is_octal = re.fullmatch(r"[-+]?0[0-9_]+", node.value)
        if is_octal or ":" in node.value:
            base = "an octal number" if is_octal else "one of base 60"
            raise _Lost(problem=f"{node.value} would be read as {base}", problem_mark=node.start_mark)
        construct = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        return construct(node)


for tag in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{tag}", StrictLoader.construct_number)


def parse_config(config_class: type[C], argv: Sequence[str] | None = None, prog: str = "", about: str = "") -> C:
    """Read a config of `config_class` from a command line (`sys.argv` if None), and check it. `prog` and `about`, the
    program's name and its docstring, are for `--help`.

    Raises:
        InputError: a field or option does not exist, or a value is not allowed.
        SystemExit: after --help, --print_config or --print_shtab.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or os.path.basename(sys.argv[0])
    _print_and_stop(config_class, argv, prog, about or sys.modules["__main__"].__doc__ or "")
    if not argv:
        raise InputError(f"--config: needs a YAML file, such as {config_class.EXAMPLE}; --help shows all fields")
    argv = _expand(config_class, argv)
    parser = _build_parser(config_class, prog)
    try:
        argv = _check_names(config_class, argv)
        _refuse_lost(argv)
        namespace = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(_one_line(str(error))) from None
    except RecursionError:
        raise InputError("the command line: a value is nested too deep to be read") from None
    sections = {
        field.name: field.type(**vars(getattr(namespace, field.name))) for field in dataclasses.fields(config_class)
    }
    config = config_class(**sections)
    for name, cls in NESTED.items():
        section, field = name.split(".")
        if (given := getattr(sections[section], field)) is not None:
            setattr(sections[section], field, cls(**vars(given)))
    if config.data.sources is not None:
        config.data.sources = [config.data.SOURCE(**vars(source)) for source in config.data.sources]
    config.check()
    use_cache_without_network(config.loaded_names())
    return config


def _print_and_stop(config_class: type[Config], argv: Sequence[str], prog: str, about: str) -> None:
    """What is asked for by --help or --print_shtab, without reading anything else."""
    for position, arg in enumerate(argv):
        option, _, value = arg.partition("=")
        following = value or next((a for a in argv[position + 1 : position + 2] if not a.startswith("-")), None)
        if option in ("--help", "-h"):
            print(help_text(config_class, following and following.removeprefix("--"), prog, about))
            raise SystemExit(0)
        if option == "--print_shtab":
            check_installed()
            parser = argparse.ArgumentParser(prog)
            add_fields(parser, config_class)
            print(completion(parser, following or ""))
            raise SystemExit(0)


@functools.cache  # it takes a fifth of a second
def _build_parser(config_class: type[Config], prog: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser, set_parsing_settings  # --help does without

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of the fields below.")
    for section in dataclasses.fields(config_class):
        if section.type is not OptimizerConfig:
            parser.add_class_arguments(section.type, section.name)
    # By hand: jsonargparse would take these two names for a class of its own to build, and import torch.
    optimizer = parser.add_argument_group("Any optimizer of any library: its class and its arguments")
    default = OptimizerConfig()
    optimizer.add_argument(
        "--optimizer.class_path", type=str, default=default.class_path, help="Import path of the class."
    )
    optimizer.add_argument(
        "--optimizer.init_args",
        type=dict[str, Any],
        default=default.init_args,
        help="Arguments of the class, e.g. --optimizer.init_args.lr 1e-4.",
    )
    optimizer.add_argument(
        "--optimizer.groups",
        type=dict[str, dict[str, Any]],
        default=default.groups,
        help="Other arguments for some parameters, by patterns of MODEL.PARAMETER, of which later ones win: "
        '{"*.bias": {weight_decay: 0}}. EDM2\'s uncertainty has its own rate by default.',
    )
    return parser


def _expand(config_class: type[Config], argv: Sequence[str]) -> list[str]:
    """--output-dir is --train.output_dir, a switch without a value (--train.overwrite) means true, and one of `LENGTHS`
    leaves the other out."""
    classes = {section.name: section.type for section in dataclasses.fields(config_class)} | NESTED
    switches = [
        f"{name}.{field.name}"
        for name, cls in classes.items()
        for field in dataclasses.fields(cls)
        if field.type in (bool, bool | None, bool | int)
    ] + [*RENAMED_VALUES]
    expanded = []
    for arg, following in zip(argv, [*argv[1:], "--"], strict=True):
        name, equals, value = arg.partition("=")
        expanded.append(ALIASES.get(name, name) + equals + value)
        if name[2:] in switches and not equals and following.startswith("--"):
            expanded.append("true")
    given = {}
    for arg, following in zip(expanded, [*expanded[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in LENGTHS:
            given[name] = value if equals else following
    for name, other in (LENGTHS, LENGTHS[::-1]):
        if given.get(name, "null") != "null" and other not in given:
            expanded += [other, "null"]
    return expanded


def _check_names(config_class: type[Config], argv: Sequence[str]) -> list[str]:
    """The arguments with today's names for fields that were renamed. Names are looked at before values: an unknown one
    gets a suggestion, which jsonargparse does not give."""
    top_level, argv = field_names(config_class), list(argv)
    known = [*top_level, *_nested_names()]
    for position, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        name, equals, value = arg[2:].partition("=")
        has_next = not equals and position + 1 < len(argv)
        value = argv[position + 1] if has_next else value
        if name == "config":
            content = _read_file(config_class, value)
            with blame(value, ValueError):
                renamed = rename_fields(content)
            if renamed:
                for old, new in renamed.items():
                    warn(f"{value}: {old} is called {new} now")
                argv[position + has_next] = ("" if has_next else "--config=") + json.dumps(content)
        elif name in RENAMED:
            warn(f"--{name} is called --{RENAMED[name]} now")
            if name in RENAMED_VALUES and value in ("true", "false"):
                value = rename_value(name, value == "true") or "null"
            argv[position + has_next] = ("" if has_next else f"--{RENAMED[name]}=") + value
            argv[position] = f"--{RENAMED[name]}" if has_next else argv[position]
        elif (
            name not in [*known, "print_config"]
            and name.removesuffix("+") not in top_level
            and not name.startswith("optimizer.init_args.")
        ):
            raise InputError(f"--{_no_such_field(name, known, '--')}")
        elif name in NESTED and value.startswith("{"):
            with contextlib.suppress(yaml.YAMLError):
                section, field = name.split(".")
                for unknown in _unknown_nested(section, {field: yaml.safe_load(value)}):
                    raise InputError(f"--{_no_such_field(unknown, known)}")
        elif name.removesuffix("+") == "data.sources":
            with contextlib.suppress(yaml.YAMLError):  # jsonargparse says what is wrong with it
                _check_source_fields(config_class, yaml.safe_load(value), "--")
    return argv


def _refuse_lost(argv: Sequence[str]) -> None:
    """A field that is given twice, also as a part of another, has a value that would be lost in silence; so has a value
    with a key twice. A file may be changed by another."""
    values = {}
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name.startswith("--") and name != "--config" and not name.endswith("+"):
            value = value if equals else following
            if name in values:
                raise InputError(f"{name}: given twice, as {values[name]:.60} and as {value:.60}")
            values[name] = value
            if value.startswith(("{", "[")):
                try:
                    yaml.load(value, StrictLoader)
                except _Lost as error:
                    raise InputError(f"{name}: {error.problem}") from None
                except yaml.YAMLError:  # jsonargparse says what is wrong with it, if anything
                    pass
    for name in values:
        if whole := next((other for other in values if name.startswith(f"{other}.")), None):
            raise InputError(f"{name}: given twice, by itself and in {whole}")


def _read_file(config_class: type[Config], path: str) -> dict[str, Any]:
    """The sections of a config file, all of whose names are known, or were before they were renamed."""
    names = [section.name for section in dataclasses.fields(config_class)]
    known = [*field_names(config_class), *_nested_names()]
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, StrictLoader)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"--config {path}: not YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: must hold sections ({', '.join(names)}), got {content!r:.60}")
    for section, fields in content.items():
        if section not in names:
            raise InputError(f"{path}: {_no_such_field(str(section), known)}")
        if not isinstance(fields, dict):
            raise InputError(f"{path}: {section}: must hold fields, got {fields!r:.60}")
        for unknown in (f"{section}.{name}" for name in fields if f"{section}.{name}" not in [*known, *RENAMED]):
            raise InputError(f"{path}: {_no_such_field(unknown, known)}")
        _check_source_fields(config_class, fields.get("sources"), f"{path}: ")
        for unknown in _unknown_nested(section, fields):
            raise InputError(f"{path}: {_no_such_field(unknown, known)}")
    return content


def _nested_names() -> list[str]:
    return [f"{name}.{field.name}" for name, cls in NESTED.items() for field in dataclasses.fields(cls)]


def _unknown_nested(section: str, fields: dict[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if f"{section}.{name}" in NESTED and isinstance(value, dict):
            yield from (n for n in (f"{section}.{name}.{key}" for key in value) if n not in _nested_names())


def _check_source_fields(config_class: type[Config], sources: Any, where: str) -> None:
    """Raise InputError, which begins with `where`, for a field of an item of data.sources that there is not."""
    data = next(section.type for section in dataclasses.fields(config_class) if section.name == "data")
    known = [field.name for field in dataclasses.fields(data.SOURCE)]
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        for name in (name for name in source if name not in known) if isinstance(source, dict) else ():
            matches = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {matches[0]}?" if matches else f"a source has {', '.join(known)}"
            raise InputError(f"{where}data.sources[{i}].{name}: no such field; {hint}")


def _no_such_field(name: str, known: list[str], prefix: str = "") -> str:
    sections = list(dict.fromkeys(k.split(".")[0] for k in known))
    if name in sections:
        first = next(field for field in known if field.startswith(f"{name}."))
        return f"{name}: a section; give its fields one by one, such as {prefix}{first}"
    for script, other in SCRIPTS.items():  # not this one's, whose fields are known
        if name in (*field_names(other), *(field.split(".")[0] for field in field_names(other))):
            return f"{name}: no such field; it is one of {script}"
    last, names = name.split(".")[-1], {k.split(".")[1] for k in known}
    elsewhere = foreign.hint(name) if last not in names else None  # of one that is in another section, that is said
    if last in SHORT and ("." in name or elsewhere is None):
        return f"{name}: no such field; did you mean {prefix}{SHORT[last]}?"
    if elsewhere is not None:
        return f"{name}: no such field; {elsewhere}"
    matches = difflib.get_close_matches(name, known if "." in name else sections, n=1, cutoff=0.7)
    if not matches:  # a field's name with another section's or none: there may be one in more than one section
        last_parts = difflib.get_close_matches(last, names, n=1, cutoff=0.7)
        matches = [k for k in known if k.split(".")[1] in last_parts]
    hint = f"did you mean {' or '.join(prefix + match for match in matches)}?" if matches else "see --help"
    return f"{name}: no such field; {hint}"


def _one_line(message: str) -> str:
    """jsonargparse's message as one line, e.g. `train.max_steps: Expected a <class 'int'>. Got value: x`."""
    if in_source := re.search(r"SourceConfig':(.*?)\n    - Expected a <class 'NoneType'>", message, re.DOTALL):
        problem = " ".join(in_source[1].replace("Parser key", "field").split())
        return f"data.sources: an item: {re.sub(r'Does not .* Errors: ', '', problem)}"
    for name, cls in NESTED.items():
        if within := re.search(rf"{cls.__name__}':\n(.*?)\n    - Expected a <class 'NoneType'>", message, re.DOTALL):
            message = within[1].strip().replace('Parser key "', f'Parser key "{name}.', 1)
        elif message.startswith(f'Parser key "{name}":'):
            value = message.rsplit("Given value: ", 1)[-1]
            return shorten(f"{name}: must be fields, {{{dataclasses.fields(cls)[0].name}: …}}, or null, got {value}")
    if message.startswith('Parser key "data.sources":'):
        return "data.sources: must be a list, each item of it {dataset: …}, or null"
    if "Union subtypes" in message:
        name = message.split('"')[1]
        expected = [
            line.strip(" -").removeprefix("Expected a ") for line in message.splitlines() if "- Expected" in line
        ]
        value = message.rsplit("Given value: ", 1)[-1]
        message = f"{name}: Expected {' or '.join(expected)}. Got value: {value}"
    message = message.replace('Parser key "', "").replace('":', ":")
    message = re.sub("(a )?typing.Literal", "one of ", message).replace("<class 'NoneType'>", "null")
    return shorten(" ".join(message.split()))
