"""The command lines of the tools."""

import argparse
from typing import NoReturn

from difftrain_utils.config.help import wrap
from difftrain_utils.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with a command line, as everything here does. Its description may
    have paragraphs; what is set in stays as it is."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, formatter_class=_Paragraphs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see --help")


class _Paragraphs(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join("\n".join(wrap(paragraph, width, indent)) for paragraph in text.strip().split("\n\n"))
