"""Translate another trainer's command line or config file into a config of train_text_to_image.py.

    difftrain migrate --from diffusers "accelerate launch --num_processes 1 train_text_to_image.py --resolution=512 …"
    difftrain migrate --from kohya --num-processes 1 config.toml
    difftrain migrate --from simpletuner --num-processes 2 config/config.json
    difftrain migrate --from mvp --num-processes 1 old.yaml > new.yaml

Prints the YAML; its comments say what is left out, and why. A command line may be quoted, with its line breaks and the
lines that set its variables before it, or be given as it is. Exit code 2 if it cannot be read. docs/migrating.md lists
all flags.
"""

import dataclasses
import json
import os
import shlex
import string
import tempfile
from pathlib import Path
from typing import Any

import yaml

from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import field_names
from difftrain_utils.config.foreign.sources import SOURCES, Source
from difftrain_utils.config.foreign.values import NULL, PROCESSES, Dropped
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import InputError, blame, one_line


class _Dumper(yaml.SafeDumper):
    """Lists of numbers in a line, of texts below each other."""


_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, str) for item in items)
    ),
)
_Dumper.ignore_aliases = lambda *_: True

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, SyntaxError)  # what a wrong value raises


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain migrate", description=__doc__)
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="the other trainer")
    parser.add_argument("--num-processes", type=int, help="on how many it ran, where its launch line does not say")
    parser.add_argument("what", nargs="...", metavar="WHAT", help="the command line, or a .toml, .json or .yaml file")
    args = parser.parse_args(argv)
    if not args.what:
        raise InputError("difftrain migrate: needs a command line or a file; see --help")
    if args.num_processes is not None and args.num_processes < 1:
        raise InputError(f"--num-processes: must be at least 1, got {args.num_processes}")
    source, path = SOURCES[args.source], Path(args.what[0])
    if len(args.what) == 1 and path.suffix in (".toml", ".json", ".yaml", ".yml"):
        given, processes = read_file(path), None
        script = source.script_of(given)
    elif "" in source.defaults:
        raise InputError(f"difftrain migrate: {source.title} config is a .json or .yaml file, got {args.what[0]!r:.60}")
    else:
        script, given, processes = read_command(args.what, source)
        for name in ("config_file", "dataset_config"):  # kohya's; what is on the command line wins
            if os.path.isfile(str(given.get(name))):
                given = read_file(Path(given.pop(name))) | given
    print(translate(source, script, given, args.num_processes or processes), end="")


# ── What is given ────────────────────────────────────────────────────────────────────────────────────────────
def read_command(words: list[str], source: Source) -> tuple[str, dict[str, Any], int | None]:
    """The script, its flags, and the number of processes that the launch line says.

    Raises:
        InputError: there is no script in it, or none that is known, or something is no flag.
    """
    if len(words) == 1:
        with blame("the command line", ValueError):
            words = shlex.split(words[0].replace("\\\n", " "), comments=True)
    variables = dict(word.split("=", 1) for word in words if word.partition("=")[0].isidentifier() and "=" in word)
    words = [string.Template(word).safe_substitute(variables) for word in words]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    known = ", ".join(f"{name}.py" for name in source.defaults)
    if at is None:
        raise InputError(f"the command line names no script; known are {known}")
    script = Path(words[at]).stem
    if script not in source.defaults:
        raise InputError(f"{words[at]}: no script of {source.title} that is known; there is {known}")
    first = next((i for i in range(at) if words[i].startswith("--")), at)
    launcher, launcher_words = read_flags(words[first:at]), {Path(word).name for word in words[:first]}
    said = [launcher[name] for name in ("num_processes", "nproc_per_node", "nproc-per-node") if name in launcher]
    processes = 1 if not launcher_words & {"accelerate", "torchrun"} else None
    if said:
        with blame("the command line: --num_processes", ValueError, TypeError):
            processes = int(said[0])
    given = read_flags(words[at + 1 :])
    if "mixed_precision" in launcher:
        given = {"mixed_precision": launcher["mixed_precision"]} | given
    return script, given, processes


def read_flags(words: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`; True of a flag without a value, a list of several."""
    flags: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else True
        elif name is None:
            raise InputError(f"the command line: {word!r}: no flag, which begins with --")
        elif flags[name] is True:
            flags[name] = word
        else:
            flags[name] = [*(flags[name] if isinstance(flags[name], list) else [flags[name]]), word]
    return flags


def read_file(path: Path) -> dict[str, Any]:
    """The fields of a file: kohya's TOML without its sections, SimpleTuner's JSON, the MVP's YAML as SECTION.FIELD.

    Raises:
        InputError: it cannot be read.
    """
    with blame(str(path), OSError, ImportError, RecursionError, yaml.YAMLError, *UNREADABLE):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return _one_folder(_read_toml(text))
        content = _read_json(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ValueError(f"must hold fields, got {content!r:.60}")
    if path.suffix == ".json":
        return {str(name).removeprefix("--"): value for name, value in content.items()}
    fields = {}
    for section, value in content.items():
        fields |= {f"{section}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {section: value}
    return fields


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)  # which takes a comma after the last field, as SimpleTuner's own examples have it


def _read_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise ValueError("to read TOML takes Python 3.11 or later") from None
    return tomllib.loads(text)


def _one_folder(content: dict[str, Any]) -> dict[str, Any]:
    """Without sections; of data sets with their folders, if it is one folder, the fields of that."""
    fields: dict[str, Any] = {}
    for name, value in content.items():
        fields |= value if isinstance(value, dict) else {name: value}
    data = fields.get("datasets")
    if isinstance(data, list) and len(data) == 1 and len(folders := data[0].get("subsets", [])) == 1:
        of_data = {name: value for name, value in fields.pop("datasets")[0].items() if name != "subsets"}
        fields |= {"train_batch_size" if name == "batch_size" else name: value for name, value in of_data.items()}
        fields |= folders[0]
    return fields


# ── What it is here ──────────────────────────────────────────────────────────────────────────────────────────
def translate(source: Source, script: str, given: dict[str, Any], processes: int | None) -> str:
    """The config as YAML, with comments on what has no counterpart.

    Raises:
        InputError: a value is none of its flag's, or the number of processes is needed.
    """
    given = {name: value for name, value in given.items() if value is not None}
    fields, left_out = convert(source, script, given, processes)
    content = nest(fields)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    dashes = "--" if script else ""
    unknown = [name for name in given if name not in source.table]
    variables = sorted({value for value in fields.values() if isinstance(value, str) and "$" in value})
    problem = refusal(text)
    comments = {
        "Otherwise than there": [source.notes[script]] if script in source.notes else [],
        "Left out": [f"{dashes}{name}: {reason}" for name, reason in left_out.items()],
        "Not known": [f"{dashes}{name}" for name in unknown],
        "To do before it starts": [f"{value}: the value of the variable" for value in variables]
        + ([problem] if problem else []),
    }
    origin = f"{source.title} {script}.py" if script else f"{source.title} config"
    lines = [f"Translated from {origin} by difftrain migrate; to start it:"]
    lines.append(f"    accelerate launch --num_processes {processes or 1} train_text_to_image.py --config THIS_FILE")
    for title, entries in comments.items():
        lines += [f"{title}:", *(f"  {' '.join(entry.split())}" for entry in entries)] if entries else []
    return "".join(f"# {line}\n" for line in lines) + text


def convert(
    source: Source, script: str, given: dict[str, Any], processes: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """{field: value}, and {flag: reason} of what was left out. What is not given has the script's default."""
    defaults = source.defaults[script]
    flags = {name: value for name, value in defaults.items() if "." not in name} | given
    flags |= {PROCESSES: processes, "script": script}
    fields, left_out = {name: value for name, value in defaults.items() if "." in name}, {}
    for name, entry in source.table.items():
        if name not in flags:
            continue
        if isinstance(entry, str):
            left_out[name] = entry
            continue
        try:
            value = entry.convert(flags[name], flags)
        except InputError:
            raise
        except Dropped as reason:
            left_out[name] = str(reason)
            continue
        except UNREADABLE as error:
            if "$" in str(flags[name]):
                left_out[name] = f"{flags[name]}: the value of the variable is needed"
                continue
            raise InputError(f"{name}: cannot read {str(flags[name])!r:.60}: {one_line(error)}") from None
        for field, of_field in (value if isinstance(value, dict) else {entry.field: value}).items():
            if of_field is not None:
                fields[field] = None if of_field is NULL else merged(fields.get(field), of_field)
    return fields, {name: reason for name, reason in left_out.items() if name in given}


def merged(old: Any, new: Any) -> Any:
    """Of two dicts, both."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: merged(old.get(name), value) for name, value in new.items()}
    return new


def nest(fields: dict[str, Any]) -> dict[str, Any]:
    """Sections of fields, in the order of the config."""
    order = {name: i for i, name in enumerate(field_names(TextToImageConfig))}
    content: dict[str, Any] = {section.name: {} for section in dataclasses.fields(TextToImageConfig)}
    for name in sorted(fields, key=lambda name: order.get(".".join(name.split(".")[:2]), len(order))):
        *path, last = name.split(".")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = merged(place.get(last), fields[name])
    return {section: of_section for section, of_section in content.items() if of_section}


def refusal(text: str) -> str | None:
    """What the script would say of such a config; None if it takes it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded, so nobody has to look for the hub
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            parse_config(TextToImageConfig, ["--config", str(path)])
        except InputError as error:
            return str(error).replace(f"{path}: ", "")
    return None
