"""The command `difftrain`.

difftrain COMMAND [OPTIONS]
difftrain COMMAND --help
difftrain --print_shtab bash
"""

import argparse
import importlib
import sys

from difftrain_utils.config.completion import add_fields, check_installed, completion
from difftrain_utils.config.scripts import SCRIPTS
from difftrain_utils.errors import InputError, one_line_errors

COMMANDS = {  # each is the function `main` of the module of that name
    "init": "copy the training scripts and configs into a folder",
    "migrate": "translate what another trainer was told into a config",
    "caption": "write captions for a folder of photos, by a model",
    "check-data": "find all that is wrong with the data of a config",
    "validate-config": "check a config, its model and its data without training",
    "plan": "estimate memory, time and data of a run on other GPUs",
    "train": "start the training script on the GPUs of this machine, or CPU",
    "generate": "draw or write with a run, a checkpoint of it or any pipeline",
    "best-guidance": "find the guidance scale at which a run draws best",
    "report": "show runs as a page with curves and samples, also while they go on",
    "score": "say how good the pictures in a folder are",
    "compare": "compare runs: whether one won, and whether that is fair",
    "ranks": "say whether settings keep their order over steps or models",
    "sweep": "compare strategies, each at its best learning rate, by a plan",
    "reproduce": "run a run again, and say whether it comes out the same",
    "posthoc-ema": "make a pipeline with an average of the weights of any width",
    "export": "write what a run has learned as one file for other programs",
    "push": "upload what a run has learned to the hub, with a model card",
    "draw-shapes": "write the built-in data set as a folder of images",
}
TAKE_CONFIG = ("train", "validate-config", "plan", "check-data")


def main() -> None:
    with one_line_errors():
        sys.exit(run(sys.argv[1:]))


def make_dummy_imagefolder() -> None:
    """What `difftrain draw-shapes` was called in the MVP."""
    with one_line_errors():
        sys.exit(run(["draw-shapes", *sys.argv[1:]]))


def run(argv: list[str]) -> int | None:
    """Run a command; returns its exit code, None for 0. Raises InputError if there is no such command."""
    name, arguments = (argv or ["--help"])[0], argv[1:]
    if name in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: difftrain COMMAND [OPTIONS]    (difftrain COMMAND --help)", "", *lines]))
        return 0
    option, _, shell = name.partition("=")
    if option == "--print_shtab":
        check_installed()
        print(completion(_parser(), shell or "".join(arguments)))
        return 0
    if name not in COMMANDS:
        raise InputError(f"difftrain: no command {name!r}; there is {', '.join(COMMANDS)}")
    module = importlib.import_module(f"difftrain_utils.commands.{name.replace('-', '_')}")
    return module.main(arguments)


def _parser() -> argparse.ArgumentParser:
    """All commands, with the options of those that take a config."""
    parser = argparse.ArgumentParser("difftrain")
    commands = parser.add_subparsers()
    for command, what in COMMANDS.items():
        of_command = commands.add_parser(command, help=what)
        if command in TAKE_CONFIG:
            add_fields(of_command, *SCRIPTS.values())
    return parser
