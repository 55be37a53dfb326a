"""The data's fingerprint, a digest of all its bytes, and a cache on the disk of what was computed about the data."""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.rows import Rows, captions_of, map_in_threads, open_image_header, read_bytes
from difftrain_utils.errors import RowError, RunError, warn
from difftrain_utils.files import write_file

VERSION = 1  # of what is cached: raise it when a digest or a size is computed otherwise
CLOCK_TICK = 0.05  # seconds, more than the steps of the clock that Linux stamps files by


def inspect_data(rows: Rows, config: DataConfig) -> dict[str, Any]:
    """Read every row once: refuse what is no image or no caption, and return the data's fingerprint.

    The fingerprint is a SHA-256 over the rows' file names, captions and image bytes, in order. Where bad rows are
    skipped, it has their bytes as they are, and null for an image that is not there. It is cached: while no file has
    changed, nothing is read.

    Raises:
        RowError: an image that Pillow does not know, or a caption that is no string (names the file), unless
            `data.on_bad_row` is skip.
    """

    if not isinstance(rows, Rows):  # a stream, which is not read as a whole
        return rows.inspect()

    def digest(index: int) -> bytes:
        row, content = rows[index], None
        captions = [row.captions] if isinstance(row.captions, str) else row.captions
        try:
            content = read_bytes(row.image, row.name)
            captions_of(captions, row.name)
            open_image_header(io.BytesIO(content), row.name)
        except RowError:
            if config.on_bad_row == "stop":
                raise
        # the file's name alone, so that a moved folder keeps its fingerprint
        name = os.path.basename((row.image or {}).get("path") or f"row {index}")
        entry = [name, captions, content if content is None else hashlib.sha256(content).hexdigest()]
        return hashlib.sha256(json.dumps(entry, default=str).encode()).digest()

    def compute() -> bytes:
        total = hashlib.sha256()
        for row_digest in map_in_threads(digest, range(len(rows))):
            total.update(row_digest)
        return json.dumps({"num_images": len(rows), "sha256": total.hexdigest()}).encode()

    found = json.loads(cached("fingerprint.json", compute, rows, config))
    names = config.dataset if config.sources is None else ", ".join(source.dataset for source in config.sources)
    return {"dataset": names} | found


def inspect_splits(rows: Rows, validation_rows: Rows | None, config: DataConfig) -> dict[str, dict[str, Any]]:
    """What `inspect_data` returns for the training rows and, where there are any, the validation rows."""
    splits = {"train": rows, "validation": validation_rows}
    return {name: inspect_data(split, config) for name, split in splits.items() if split is not None}


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, or `difftrain` in the cache of datasets."""
    folder = config.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "difftrain"
    return Path(folder).expanduser()


def cache_key(rows: Rows, config: DataConfig) -> str:
    """A digest that changes when a file that holds rows or images changes, or other rows of them are taken.

    `Dataset._fingerprint` (datasets 5.2) has the paths and modification times of local files; it does not notice a file
    that is changed and given its old time back, nor an image that only a row of parquet names. So besides, of every
    file that is read: size, and the times of the last change of content and of any change, which nobody can set back.
    """
    key = hashlib.sha256(repr((VERSION, config.on_bad_row, Image.MAX_IMAGE_PIXELS)).encode())
    for part in rows.parts:
        columns = part.source.image_column, part.source.caption_column
        files = [_stamp(file["filename"]) for file in part.data.cache_files]
        key.update(repr((part.data._fingerprint, columns, len(part), files)).encode())
        key.update(b"all" if part.indices is None else part.indices.tobytes())
        for paths, is_file in part.paths():
            files = [_stamp(path) for path, read in zip(paths, is_file, strict=True) if read]
            key.update(repr(files).encode())
    return key.hexdigest()


def _stamp(path: str) -> tuple | None:
    try:
        stat = os.stat(path)
    except OSError:
        return path, None
    return path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def cached(name: str, compute: Callable[[], bytes], rows: Rows, config: DataConfig) -> bytes:
    """The content of a file `name` of these rows in the cache; where it is not there, what `compute()` returns, which
    is kept unless a file was changed meanwhile. A cache that cannot be written is warned of."""
    key = cache_key(rows, config)
    path = cache_folder(config) / f"{key}-{name}"
    try:
        return path.read_bytes()
    except OSError:
        pass
    time.sleep(CLOCK_TICK)  # what is written after this has another time than the key knows
    content = compute()
    if cache_key(rows, config) == key:
        try:
            write_file(path, content, shared=True)
        except RunError as error:
            warn(f"data.cache_dir: {error}; the data will be read again next time")
    return content
