"""A data set read as a stream, for one that does not fit on the disk.

Here, too, sample k is a function of (config, seed, k). The stream is one epoch after another. In each, the files come
in an order drawn from (seed, epoch), and the rows of a file as they stand in it. The stream is cut into windows of
B = `data.shuffle_buffer` rows, and each window is shuffled: sample k is row order[k % B] of window w = k // B, where
order is drawn from (seed, w). So nobody has to know the number of rows, and all that resuming needs is the place
(epoch, file, row) where the next sample's window begins. The shuffle buffer of `datasets` loses its content instead.
"""

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec

from difftrain_utils.config.data import DataConfig
from difftrain_utils.data.rows import Row, captions_in, map_in_threads, mask_in, read_bytes
from difftrain_utils.data.sources import (
    cannot_load,
    caption_features,
    check_columns,
    load_arguments,
    sources_of,
    used_columns,
)
from difftrain_utils.errors import InputError, RowError, blame, one_line, warn
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.image import open_image_header
from difftrain_utils.media.text import captions_of

READ_AT_A_TIME = 16  # rows that are converted from Arrow together
END_BYTES = 2**16  # of each end of a file, for its digest: the end of a parquet file says where all its columns lie


class Place(NamedTuple):
    """Where a window begins: at row `row` of the epoch's `file`-th file."""

    window: int
    epoch: int
    file: int
    row: int


def open_stream(config: DataConfig, seed: int) -> "StreamedRows":
    """The rows of `data.dataset` as a stream. Reads the list of its files, and the first row.

    Raises:
        InputError: the data set, its split or a column is not there, or has no rows.
        RowError: the first row has no image or caption, unless `data.on_bad_row` is skip.
    """
    ((field, source),) = sources_of(config)
    with blame(cannot_load(field, source), Exception):  # whatever stops datasets
        builder = datasets.load_dataset_builder(**load_arguments(field, source, config))
        data = builder.as_streaming_dataset(split=config.split)
        files = list(builder.config.data_files[config.split])
    check_columns(data, field, source)
    rows = StreamedRows(used_columns(data, source), files, config, seed)
    first = rows.first()
    if config.on_bad_row == "stop":
        open_image_header(io.BytesIO(read_bytes(first.image, first.name)), first.name)
        captions_of(first.captions, first.name)
    return rows


class StreamedRows:
    """Item k is the row of sample k. Keys should grow: a window is read when its first row is asked for, and kept until
    one of another window is. Each process, and each worker of a data loader, reads the whole stream.

    `data` has undecoded images; `files` are what it is read from.
    """

    def __init__(self, data: datasets.IterableDataset, files: list[str], config: DataConfig, seed: int):
        self.data, self.files, self.config, self.seed = data, files, config, seed
        ((_, self.source),) = sources_of(config)
        self.captions = caption_features(data, self.source)
        self.sha256 = files_digest(files)
        self.identity = hashlib.sha256(f"{self.sha256}/{seed}/{config.shuffle_buffer}".encode()).hexdigest()
        self._start = Place(0, 0, 0, 0)  # what the stream can be read from, besides its beginning
        self._place, self._rows, self._reader = self._start, [], None  # of the window that is held

    def __getitem__(self, k: int) -> Row:
        window, position = divmod(k, self.config.shuffle_buffer)
        self._hold(window)
        return self._rows[position]

    @property
    def has_masks(self) -> bool:
        """Whether there are masks."""
        return self.source.mask_column is not None

    def loss_weight(self, index: int) -> float:
        """The factor of a row's loss."""
        return self.source.loss_weight

    def order(self, seed: int, batch_size: int, buckets=None) -> range:
        """Row k is that of sample k."""
        return range(sys.maxsize)

    def substitutes(self, index: int, k: int, seed: int, buckets=None) -> tuple[Iterator[int], str]:
        """The other rows of the window, because in a stream no row can be drawn."""
        size = self.config.shuffle_buffer
        window, position = divmod(k, size)
        others = (window * size + (position + step) % size for step in range(1, size))
        return others, f"any of the {size} rows that are shuffled with it"

    def place(self, k: int) -> dict[str, Any]:
        """Where the window of sample k begins, and in which stream."""
        self._hold(k // self.config.shuffle_buffer)
        return {"stream": self.identity} | self._place._asdict()

    def load_place(self, place: dict[str, Any] | None) -> None:
        """Read from `place` on; None: from where it was read before.

        A run that branches off with another data set, seed or shuffle buffer has another stream: its place for sample k
        is found by reading all before, with a warning.
        """
        if place is None:
            return
        if place["stream"] != self.identity:
            warn("train.resume_from: the checkpoint is of another stream; this one is read from its beginning")
            return
        self._start = Place(*(place[name] for name in Place._fields))
        self._rows = []

    def first(self) -> Row:
        """The first row of the first epoch."""
        reader = self._read(0, 0, 0)
        row, _ = next(reader)
        reader.close()  # before workers are forked, which would share its open file
        return row

    def inspect(self, config: DataConfig) -> dict[str, Any]:
        """The fingerprint: a SHA-256 over the files, because nobody has read all rows."""
        return {"dataset": self.config.dataset, "streaming": True, "num_files": len(self.files), "sha256": self.sha256}

    def _hold(self, window: int) -> None:
        if not self._rows or window < self._place.window:
            start = self._start if self._start.window <= window else Place(0, 0, 0, 0)
            self._next, self._reader = start, self._read(start.epoch, start.file, start.row)
            self._load_window()
        while self._place.window < window:
            self._load_window()

    def _load_window(self) -> None:
        self._place, self._rows, size = self._next, [], self.config.shuffle_buffer  # one window in memory at a time
        rows, places = zip(*itertools.islice(self._reader, size), strict=True)
        self._next = Place(self._place.window + 1, *places[-1])
        order = generator_for(self.seed, "window", self._place.window).permutation(size)
        self._rows = [rows[i] for i in order.tolist()]

    def _read(self, epoch: int, file: int, row: int) -> Iterator[tuple[Row, tuple[int, int, int]]]:
        """The rows of the stream from a place on, each with the place after it."""
        found = (file, row) != (0, 0)
        while True:
            order = generator_for(self.seed, "files", epoch).permutation(self.data.num_shards).tolist()
            while file < len(order):
                for content in self._read_file(order[file], row):
                    found, row = True, row + 1
                    yield content, (epoch, file, row)
                file, row = file + 1, 0
            if not found:
                raise InputError(f"data.dataset: {self.config.dataset} has no images")
            epoch, file, found = epoch + 1, 0, False

    def _read_file(self, index: int, row: int) -> Iterator[Row]:
        """The rows of one file from `row` on. What lies before is passed over, which takes reading, but no more.

        Of a shard of `datasets` `iter` reads all rows in a worker of a data loader, too, where `__iter__` would share
        them out among the workers.
        """
        shard = self.data.shard(self.data.num_shards, index)
        name = self.files[index] if len(self.files) == self.data.num_shards else self.config.dataset
        try:
            for batch in shard.skip(row).iter(batch_size=READ_AT_A_TIME):
                for values in zip(*batch.values(), strict=True):
                    content = dict(zip(batch, values, strict=True))
                    image = content[self.source.image_column]
                    caption, mask = captions_in(content, self.captions, self.source), mask_in(content, self.source)
                    yield Row((image or {}).get("path") or f"{name} row {row}", image, caption, mask)
                    row += 1
        except Exception as error:  # of the file system, the network, or the file's format
            raise RowError(f"{name}: cannot read what comes after {row} rows: {one_line(error)}") from None


def files_digest(files: list[str]) -> str:
    """SHA-256 over the names, sizes and contents of `files`, in order, without reading all of them.

    The content is described by the file system's own digest, on the hub, and else by the two ends of the file. The
    names are without their folders, so that a moved data set keeps its digest.
    """

    def describe(url: str) -> list[Any]:
        system, path = fsspec.url_to_fs(url)
        info = system.info(path)
        content = info.get("blob_id") or info.get("ETag")
        if content is None:
            size = info["size"]
            ends = [(0, min(END_BYTES, size)), (max(0, size - END_BYTES), size)]
            parts = [system.cat_file(path, start, end) for start, end in ends]
            content = hashlib.sha256(b"".join(parts)).hexdigest()
        return [PurePosixPath(path).name, info["size"], content]

    digest = hashlib.sha256()
    with blame("data.dataset", OSError):
        for entry in map_in_threads(describe, files):
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
