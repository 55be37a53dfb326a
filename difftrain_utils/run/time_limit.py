"""A process that hangs ends with a line that says where, so that a launcher can start it again."""

import os
import platform
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent)


@contextmanager
def time_limit(minutes: float | None, what: str) -> Iterator[None]:
    """End this process with exit code 1 if the block takes longer; null: never.

    `what` says what has gone wrong then, and which field has set the limit. A thread ends the process, because one that
    waits for another or for a file system hears neither exceptions nor signals. Where all wait for one, the line of
    that one says what it does.
    """
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, _end, (what, threading.get_ident()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(what: str, thread: int) -> None:
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    who = f"process {rank} of {world_size} on {platform.node()}"
    print(f"\nerror: {what}; {who} is in {_place(thread)}", file=sys.stderr, flush=True)
    os._exit(1)  # sys.exit would wait for what hangs


def _place(thread: int) -> str:
    """Where a thread is: the innermost line of ours, and the function that this has led to."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE) or frame.filename == sys.argv[0]]
    line, inner = (ours or frames)[-1], frames[-1]
    return f"{line.filename} line {line.lineno} ({line.name})" + (f", {inner.name}" if inner is not line else "")
