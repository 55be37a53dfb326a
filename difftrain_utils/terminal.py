"""What a process prints and the signals that it gets, whatever becomes of the terminal or the pipe at the other end."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


QUIET = 20  # seconds after which a log wants to hear of what goes on


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all; to be asked before there is an `Accelerator`."""
    return os.environ.get("RANK", "0") == "0"


def announce(text: str) -> None:
    """Say what is being done that may take a while."""
    if is_main_process():
        print(f"{text} ...", flush=True)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, and how far it has come with them: a bar where there is a terminal, else a line now and then; nothing
    where it takes less than a second."""
    if not is_main_process():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, delay=1, dynamic_ncols=True)
    else:
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last > QUIET:
                last = time.monotonic()
                print(f"{what}: {done} of {total}", flush=True)
            yield item


def printable(text: str) -> str:
    """A text without what a terminal would obey, such as colours and a title out of somebody's file."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Lasting:
    """A stream whose reader may go away: what is written after that is lost, and nothing else."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """What is buffered, and what is flushed when Python ends, goes nowhere, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def outlast_readers() -> None:
    """Let stdout and stderr outlast whoever reads them: `| tee log` and Ctrl-C, `| head`, a terminal that is closed."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Lasting):
            setattr(sys, name, Lasting(getattr(sys, name)))


def stop_in_one_line() -> None:
    """A signal ends the process with a line and exit code 75 (SIGINT: 130), wherever it finds it. `nohup` keeps SIGHUP
    away."""
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def leave_signals_to_parent(*arguments) -> None:
    """In a worker: who asks a whole group of processes to stop, as Slurm and Ctrl-C do, has to wait for the parent,
    which needs its workers until the end of the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """At the end of their parent, which otherwise asks them by SIGTERM and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would call it an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _stop(number: int, frame) -> None:
    if is_main_process():
        print(f"\nstopped by {signal.Signals(number).name}: run the same command again", file=sys.stderr, flush=True)
    raise SystemExit(130 if number == signal.SIGINT else STOPPED)
