"""Bad input is told in one line that names the culprit, and exits with code 2."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class InputError(ValueError):
    """The user's input is wrong: config, data, model folder, checkpoint or command line.

    The message is one line: the file, field or step, what was got and what is allowed.
    """


class RowError(InputError):
    """One row of the data is wrong, which perhaps only one of several processes gets to see."""


@contextmanager
def blame(culprit: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's `errors` into an InputError about `culprit`, with the library's reason in one line."""
    try:
        yield
    except InputError:  # names its culprit already
        raise
    except errors as error:
        raise InputError(f"{culprit}: {' '.join(str(error).split()) or type(error).__name__}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an `InputError` as one line on stderr and exit with code 2.

    What all processes see, the main process alone tells.
    """
    try:
        yield
    except InputError as error:
        # A data loader's worker wraps the message in its traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.{type(error).__name__}: ")
        if os.environ.get("RANK", "0") == "0":
            tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is shown
        elif isinstance(error, RowError):
            print(f"\nerror: {message}", file=sys.stderr, flush=True)  # the bar is another process's
        sys.exit(2)
