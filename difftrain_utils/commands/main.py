"""The command `difftrain`.

difftrain COMMAND [OPTIONS]
difftrain COMMAND --help
"""

import importlib
import sys

from difftrain_utils.errors import InputError, one_line_errors

COMMANDS = {  # each is the function `main` of the module of that name
    "init": "copy the training scripts and configs into a folder, to use and to change",
    "validate-config": "check a config, its model and its data without training",
    "check-data": "find all that is wrong with the images and captions of a config",
    "compare": "compare runs: their results, whether one won, and whether that is fair",
    "reproduce": "run a run again, and say whether it comes out the same",
    "export": "write a run's adapters with the names that other programs know",
    "posthoc-ema": "make a pipeline with an average of the weights of any width",
    "caption": "write captions for the photos of a folder by a model",
    "draw-shapes": "write the built-in data set as a folder of images",
}


def main() -> None:
    with one_line_errors():
        sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int | None:
    """Run a command; returns its exit code, None for 0. Raises InputError if there is no such command."""
    name, arguments = (argv or ["--help"])[0], argv[1:]
    if name in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: difftrain COMMAND [OPTIONS]    (difftrain COMMAND --help)", "", *lines]))
        return 0
    if name not in COMMANDS:
        raise InputError(f"difftrain: no command {name!r}; there is {', '.join(COMMANDS)}")
    module = importlib.import_module(f"difftrain_utils.commands.{name.replace('-', '_')}")
    return module.main(arguments)
