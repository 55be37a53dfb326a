"""Where texts come from: folders of .txt, JSONL, CSV, parquet and arrow files, hub data sets, words of brackets."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from difftrain_utils.builtins.brackets import words
from difftrain_utils.config.rows import RowsSource
from difftrain_utils.config.text_data import TextSourceConfig
from difftrain_utils.data.photos import list_files
from difftrain_utils.errors import InputError
from difftrain_utils.files import local_path
from difftrain_utils.media import text
from difftrain_utils.media.media import media_of

BRACKETS, NUM_BRACKETS = "builtin:brackets", 20000
KINDS = {"txt": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}


def builtin_texts(name: str, field: str) -> datasets.Dataset:
    """A built-in data set, with the column `text`. Raises InputError if there is none of that name."""
    if name != BRACKETS:
        raise InputError(f"{field}: no such builtin: {name!r}; there is {BRACKETS}")
    return datasets.Dataset.from_dict({"text": words(NUM_BRACKETS, seed=0)})


def load_arguments(source: TextSourceConfig, field: str) -> dict[str, Any]:
    """How `datasets` is to load a source: a folder of files of one kind, such a file, or a hub name. Of .txt files each
    is a row, in the column `text`.

    Raises:
        InputError: a folder has files of several kinds, or none.
    """
    place = local_path(source.dataset)
    if place.is_file():
        if (kind := _kind(place)) is None:
            raise InputError(f"{field}: {place} must end in {', '.join(f'.{ending}' for ending in KINDS)}")
        return {"path": kind, "data_files": {source.split: str(place)}} | _each_a_row(kind)
    if not place.is_dir():
        return {"path": source.dataset}
    kinds = {kind: path for path in reversed(list_files(place)) if (kind := _kind(path))}
    if not kinds:
        raise InputError(f"{field}: {place} has no files that end in {', '.join(f'.{ending}' for ending in KINDS)}")
    if len(kinds) > 1:
        some = " and ".join(str(path) for path in list(kinds.values())[:2])
        raise InputError(f"{field}: {place} has files of several kinds, such as {some}")
    return {"path": str(place)} | _each_a_row(*kinds)


def _kind(path: Path) -> str | None:
    return KINDS.get(path.suffix.lower()[1:])


def _each_a_row(kind: str) -> dict[str, str]:
    return {"sample_by": "document"} if kind == "text" else {}


@contextlib.contextmanager
def blame_file(source: RowsSource) -> Iterator[None]:
    """Raise InputError about the file, and its line, that keeps texts from being loaded, where it is one here."""
    try:
        yield
    except Exception:
        place = local_path(source.dataset)
        if media_of(source) is text and place.exists():
            for path in list_files(place) if place.is_dir() else [place]:
                check_file(path)
        raise


def check_file(path: Path) -> None:
    """Raise InputError for the first line of a JSONL file that is no object, and for a .txt file that is no UTF-8."""
    kind, number, line = _kind(path), 0, b""
    try:
        if kind == "text":
            path.read_bytes().decode()
        for number, line in enumerate(path.read_bytes().splitlines() if path.suffix == ".jsonl" else (), start=1):
            if line.strip() and not isinstance(json.loads(line.decode()), dict):
                raise InputError(f"{path} line {number}: must be an object, {{…}}, got {line.decode():.80}")
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {number}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}{f' line {number}' if number else ''}: not UTF-8") from None
    if kind in ("text", "json", "csv") and not path.stat().st_size:
        raise InputError(f"{path}: is empty")
