"""What videos and sounds have in common: files are opened and not read whole, and a sample is a window in time."""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from difftrain_utils.config.rows import RowsConfig
from difftrain_utils.errors import RowError, one_line

STARTS = {"start": 0.0, "middle": 0.5, "all": 0.0}  # of windows whose place is the same each time
BLOCK = 2**20  # bytes that are read at once


def remedy_for(config: RowsConfig) -> str:
    """What a config that stops at bad rows is told at the end of why one is bad, though nothing is damaged."""
    return " (data.on_bad_row skip leaves such out)" if config.on_bad_row == "stop" else ""


@contextlib.contextmanager
def open_file(value: dict[str, Any] | None, name: str, noun: str) -> Iterator[BinaryIO]:
    """The content of an undecoded `datasets.Video`, or `Audio`, which is in the row, in a file or (of a stream) at a
    URL, of which no more is read than is asked for. Errors call it by its noun.

    Raises:
        RowError: there is none, or its file cannot be read.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise RowError(f"{name}: no {noun}")
    if value["bytes"] is not None:
        yield io.BytesIO(value["bytes"])
        return
    try:
        with fsspec.open(value["path"], "rb") if "://" in value["path"] else Path(value["path"]).open("rb") as file:
            yield file
    except OSError as error:
        raise RowError(f"{name}: {error.strerror or one_line(error)}") from None


def digest_of(value: dict[str, Any] | None, name: str, noun: str) -> str:
    """SHA-256 of a row's file. Raises RowError if it cannot be read."""
    digest = hashlib.sha256()
    with open_file(value, name, noun) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def least_to_most(values: Sequence[float]) -> str:
    """Such as "2.1 to 30"."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
