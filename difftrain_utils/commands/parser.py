"""The command lines of the tools."""

import argparse
from typing import NoReturn

from difftrain_utils.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with a command line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see --help")
