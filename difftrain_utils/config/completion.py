"""Completion of options and their values in a shell, by shtab."""

import argparse
import importlib.util

from difftrain_utils.config.config import Config
from difftrain_utils.config.help import NESTED, choices, sections
from difftrain_utils.errors import InputError, not_installed

SHELLS = ("bash", "zsh", "tcsh")


def add_fields(parser: argparse.ArgumentParser, *config_classes: type[Config]) -> None:
    """The options of scripts with these configs, with the values that those have which have few."""
    import shtab

    for option in ("--config", "--output-dir", "--resume-from"):
        parser.add_argument(option).complete = shtab.FILE
    for option in ("--print_config", "--print_shtab"):
        parser.add_argument(option)
    found: dict[str, tuple[str, list[str]]] = {}
    for title, fields in [section for of in config_classes for section in sections(of).values()]:
        for field in fields:
            if field.name not in NESTED:
                first, known = found.get(field.name, (title, []))
                found[field.name] = first, [*dict.fromkeys([*known, *choices(field.kind)])]
    for name, (title, values) in found.items():
        parser.add_argument(f"--{name}", choices=values or None, help=title)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The shell's script, to be sourced or put where the shell looks for completions.

    Raises:
        InputError: there is no completion for the shell.
    """
    if shell not in SHELLS:
        raise InputError(f"--print_shtab: must be {', '.join(SHELLS)}, got {shell!r}")
    import shtab

    return shtab.complete(parser, shell)


def check_installed() -> None:
    """Raise InputError unless shtab is installed."""
    if importlib.util.find_spec("shtab") is None:
        raise InputError(f"--print_shtab: {not_installed('shtab')}")
