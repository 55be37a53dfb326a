"""What goes wrong is reported in one line that names the culprit."""

import errno
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError
from tqdm import tqdm

from difftrain_utils.terminal import is_main_process, outlast_readers, printable, stop_in_one_line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
LOAD_ERRORS = (  # what libraries raise on files of models and checkpoints that are damaged, or somebody's
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError),
    *(SafetensorError, UnpicklingError),
)


class InputError(ValueError):
    """The user's input is wrong: config, data, model folder, checkpoint or command line. Exit code 2.

    The message is one line: the file, field or step, what was got and what is allowed.
    """


class DataError(InputError):
    """Something in the data is wrong, which perhaps only one of several processes gets to see."""


class RowError(DataError):
    """One row of the data is wrong."""


class FileError(DataError):
    """A file of the data cannot be read. No other row stands in for those that it has."""


class RunError(RuntimeError):
    """A run with good input cannot go on: the loss is not finite, the disk is full. Exit code 1.

    The message is one line: what happened at which step, and what is left to go on from.
    """


class ProcessError(RunError):
    """What perhaps only one of several processes gets to see: that others have not come."""


@contextmanager
def blame(culprit: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's `errors` into an InputError about `culprit`, with the library's reason in one line."""
    try:
        yield
    except InputError:  # names its culprit already
        raise
    except errors as error:
        raise InputError(f"{culprit}: {one_line(error)}") from error


@contextmanager
def writing(path: os.PathLike) -> Iterator[None]:
    """Turn what stops a file or folder from being written into a RunError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise RunError(f"cannot write {path}: {reason}") from error


@contextmanager
def go_on_without() -> Iterator[None]:
    """Warn of a RunError: what cannot be written is worth less than the run."""
    try:
        yield
    except RunError as error:
        warn(f"{error}; training goes on without it")


def is_death_of_worker(error: Exception) -> bool:
    """Whether a data-loading worker has died. Torch raises it from a signal handler: in whatever the main thread does,
    not only where the next batch is asked for."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def one_line(error: Exception) -> str:
    """An error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


EXTRAS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "scipy": "pairing",
    "torchmetrics": "metrics",
    "peft": "lora",
    "bitsandbytes": "quantization",
    "ftfy": "prx",
    "sentencepiece": "sentencepiece",
    "shtab": "completion",
    "av": "video",
    "soundfile": "audio",
    "soxr": "audio",
    "torchsde": "audio",
}


def not_installed(package: str) -> str:
    """What to say of it: this project's extra that brings it, if there is one."""
    what = f"-c constraints.txt -e '.[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"{package} is not installed (pip install {what})"


def check_installed(packages: Mapping[str, str]) -> None:
    """Raise InputError unless these optional packages, by what asks for them, are here."""
    for culprit, package in packages.items():
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{culprit}: {not_installed(package)}")


def shorten(text: str, length: int = 300) -> str:
    """A text that quotes a value of any length, to be read in a line."""
    return text if len(text) <= length else text[: length - 1] + "…"


def counted(number: int, plural: str) -> str:
    """Such as "1 sound" and "2 sounds"."""
    return f"{number} {plural if number != 1 else plural.removesuffix('s')}"


def some(names: Sequence[str]) -> str:
    """The first three of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def warn(message: str) -> None:
    """Print a line on stderr, once for all processes, on a line of its own whatever progress bar is shown."""
    if is_main_process():
        tqdm.write(f"warning: {printable(message)}", file=sys.stderr)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an `InputError`, a `RunError`, an error of the disk or the end of a data loader's worker as one line on
    stderr, and exit with 2 (input) or 1. From here on a signal ends the process in one line, too, and who reads what is
    printed may go away.

    What all processes see, the main process alone reports.
    """
    outlast_readers()
    stop_in_one_line()
    threading.excepthook = _report_unless_disk
    try:
        yield
    except (InputError, RunError) as error:
        message = str(error).strip()
        if "Traceback (most recent call last)" in message:  # a data loader's worker's: the last line is ours
            message = message.splitlines()[-1].removeprefix(f"{__name__}.{type(error).__name__}: ")
        message = message.replace("\n", "\\n")
        everywhere = isinstance(error, DataError | ProcessError)
        _exit(message, everywhere, code=2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _exit("stopped at once, without a checkpoint", everywhere=False, code=130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _exit(f"cannot write {error.filename or 'a file'}: {error.strerror}", everywhere=True, code=1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            _exit(_describe_out_of_memory(error), everywhere=True, code=1)
        if "DefaultCPUAllocator" in str(error):
            _exit(f"out of main memory: {one_line(error).rpartition('DefaultCPUAllocator: ')[2]}", True, code=1)
        if not is_death_of_worker(error):
            raise
        reason = str(error.__cause__ if isinstance(error.__cause__, RuntimeError) else error).strip().rstrip(".")
        hint = ", most likely for want of memory: fewer data.num_workers need less" if "Killed" in reason else ""
        message = f"a data-loading worker (data.num_workers) died{hint} ({' '.join(reason.split())})"
        _exit(message, everywhere=True, code=1)
    except MemoryError as error:
        _exit(f"out of main memory: {one_line(error)}", everywhere=True, code=1)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        _exit("train.compile: the denoiser saw too many shapes to compile it for each", everywhere=False, code=1)


def _describe_out_of_memory(error: Exception) -> str:
    """What torch says was asked for and is in use, what of that training holds, and which options need less."""
    from difftrain_utils.devices import memory_of_training

    said = one_line(error).split(" If reserved")[0].rstrip(".")
    advice = "train.gradient_accumulation_steps, train.gradient_checkpointing and train.precision bf16 need less"
    return f"{said}. Of it: {memory_of_training()}; the rest is activations, averages and frozen parts. {advice}"


def _report_unless_disk(args: threading.ExceptHookArgs) -> None:
    """A tracker's thread that cannot write prints no traceback: who hands it something to write gets the error."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(args)


def _exit(message: str, everywhere: bool, code: int) -> None:
    message = printable(message)
    if is_main_process():
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, whatever bar is shown
    elif everywhere:
        print(f"\nerror: {message}", file=sys.stderr, flush=True)  # the bar is another process's
    sys.exit(code)
