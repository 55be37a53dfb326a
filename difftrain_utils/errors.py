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
    """Print an `InputError`, or the end of a data loader's worker, as one line on stderr and exit with code 2.

    What all processes see, the main process alone tells.
    """
    try:
        yield
    except InputError as error:
        # A data loader's worker wraps the message in its traceback: the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.{type(error).__name__}: ")
        _exit(message, everywhere=isinstance(error, RowError))
    except RuntimeError as error:
        # Torch raises it from a signal handler: anywhere, not only where the next batch is asked for.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        reason = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error).strip().rstrip(".")
        hint = ", most likely for want of memory: fewer data.num_workers need less" if "Killed" in reason else ""
        _exit(f"a data-loading worker (data.num_workers) died{hint} ({' '.join(reason.split())})", everywhere=True)


def _exit(message: str, everywhere: bool) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is shown
    elif everywhere:
        print(f"\nerror: {message}", file=sys.stderr, flush=True)  # the bar is another process's
    sys.exit(2)
