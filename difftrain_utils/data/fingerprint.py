"""A digest of the data, and a cache on the disk of what was computed about it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from difftrain_utils.config.rows import RowsConfig
from difftrain_utils.errors import RunError, warn
from difftrain_utils.files import local_path, write_file

VERSION = 1  # of what is kept: raise it when a digest or a size is computed otherwise
CLOCK_TICK = 0.05  # seconds, more than the steps of the clock that Linux stamps files by


def cache_folder(config: RowsConfig) -> Path:
    """`data.cache_dir`, or `difftrain` in the cache of datasets."""
    folder = config.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "difftrain"
    return local_path(folder)


def stamp(path: str) -> tuple | None:
    """What changes when a file is changed: its size, and the times of the last change of its content and of any
    change, which nobody can set back."""
    try:
        stat = os.stat(path)
    except OSError:
        return path, None
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def remembered(
    name: str,
    compute: Callable[[], bytes],
    identify: Callable[[], str],
    config: RowsConfig,
    read: Callable[[Path], Any] = Path.read_bytes,
) -> Any:
    """The content of a file `name` in the cache folder, of the data that `identify()` stands for; where it is not
    there, what `compute()` returns, which is kept unless the data was changed meanwhile. `read` may map the file.

    A folder that cannot be written is warned of.
    """
    identity = identify()
    path = cache_folder(config) / f"{identity}-{name}"
    try:
        return read(path)
    except OSError:
        pass
    time.sleep(CLOCK_TICK)  # what is written after this has another time than `identity` knows
    content = compute()
    if identify() == identity:
        try:
            write_file(path, content, shared=True)
        except RunError as error:
            warn(f"data.cache_dir: {error}; the data will be read again next time")
    return content


def inspect_splits(rows, validation_rows, config: RowsConfig) -> dict[str, dict[str, Any]]:
    """The fingerprints of the training rows and, where there are any, of the validation rows: see `Rows.inspect`."""
    splits = {"train": rows, "validation": validation_rows}
    return {name: split.inspect(config) for name, split in splits.items() if split is not None}
