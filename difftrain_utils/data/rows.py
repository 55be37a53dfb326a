"""The rows of the data: one sequence of all sources', and which of them are held out."""

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.fingerprint import VERSION, remembered, stamp
from difftrain_utils.data.order import Order
from difftrain_utils.data.sources import (
    open_source,
    sources_of,
    split_by_repeats,
    text_features,
    validation_source,
    weight_of,
    weight_path,
)
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.captions import captions_of, complete
from difftrain_utils.media.media import Row, media_of
from difftrain_utils.terminal import progress

BATCH = 65536  # rows of which something is in memory at a time
NUM_SUBSTITUTES = 10  # where more than ten rows in a row cannot be read, the data needs a look


class Rows(Protocol):
    """What training asks of its rows, whether they lie on the disk (`MappedRows`) or are read as a stream
    (`StreamedRows`). What an index is, their order says: a row's number, or its place in a stream."""

    has_masks: bool
    """Whether a source has masks."""
    buckets: Any
    """Of rows that are held out: what says the size of each; None: all have that of the config."""

    def __getitem__(self, index: Any) -> Row: ...

    def loss_weight(self, index: Any) -> float:
        """The factor of a row's loss: its source's times its own. Raises RowError if a row's own is none."""

    def order(self, seed: int, batch_size: int, buckets=None) -> Sequence[Any]:
        """The index of the row of each sample k, and `epoch_length`. Raises InputError where there is none."""

    def substitutes(self, index: Any, k: int, seed: int, buckets=None) -> tuple[Iterable[Any], str]:
        """The rows that may stand in for row `index` as sample k, in their order, and what they are in words."""

    def inspect(self, config: DataConfig) -> dict[str, Any]:
        """The fingerprint: {"dataset": …, "sha256": …, …}. Raises RowError for what is found to be wrong."""


@dataclasses.dataclass
class SourceRows:
    """Rows of one source: all, or those that the ascending `indices` (an integer array) choose.

    Not `data.select`, which writes its indices to the disk and looks them up in Arrow for each row.
    """

    data: datasets.Dataset
    source: SourceConfig
    indices: np.ndarray | None = None
    repeats: int = 1
    """How often an epoch has each row."""
    windows: np.ndarray | None = None
    """Which of a video's clips each is, where these are rows of their own (`spread_clips`)."""

    def __post_init__(self):
        self.media, self.texts = media_of(self.source), text_features(self.data, self.source)
        self.weight_path = weight_path(self.data, self.source)
        self.weight_rows = self.data.select_columns(self.weight_path[:1]) if self.weight_path else None

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> Row:
        content = self.data[self._place(index)]
        row = self.media.row_of(content, f"{self.source.dataset} row {index}", self.source, self.texts)
        return row if self.windows is None else row._replace(window=int(self.windows[index]))

    def weight(self, index: int) -> float:
        """That of a row, 1 where the source names no column of them. Raises RowError if it is none."""
        if self.weight_rows is None:
            return 1.0
        return weight_of(self.weight_rows[self._place(index)], self.weight_path, f"{self.source.dataset} row {index}")

    def _place(self, index: int) -> int:
        return index if self.indices is None else int(self.indices[index])

    def batches(self, column: str) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Some rows at a time, a stretch of a column in Arrow and which of its values are those of the rows."""
        data = self.data.select_columns([column]).with_format("arrow")
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            rows = np.arange(start, stop) if self.indices is None else self.indices[start:stop]
            first = int(rows[0])
            yield data[first : int(rows[-1]) + 1][column], pa.array(rows - first)


class MappedRows(Sequence):
    """All rows of the sources `parts`, in order; row i is a `Row`.

    The data sets stay mapped from the disk: nothing here grows with the rows, but for the indices of a split.
    """

    def __init__(self, parts: Sequence[SourceRows]):
        self.parts, self.buckets = list(parts), None
        self._ends = list(itertools.accumulate(self.lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, row = self._place(index)
        return part[row]

    def _place(self, index: int) -> tuple[SourceRows, int]:
        """The source of a row, and which of its rows it is."""
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    @property
    def has_masks(self) -> bool:
        """Whether a source has masks."""
        return any(part.source.mask_column for part in self.parts)

    def take(self, indices: np.ndarray) -> "MappedRows":
        """The rows of these ascending indices."""
        parts = []
        for part, end in zip(self.parts, self._ends, strict=True):
            within = indices[(indices >= end - len(part)) & (indices < end)] - (end - len(part))
            chosen = within if part.indices is None else part.indices[within]
            windows = None if part.windows is None else part.windows[within]
            parts.append(dataclasses.replace(part, indices=chosen, windows=windows))
        return MappedRows(parts)

    @property
    def lengths(self) -> list[int]:
        """The number of rows of each source."""
        return [len(part) for part in self.parts]

    @property
    def weights(self) -> list[float | None]:
        """Each source's weight, as the config has it."""
        return [part.source.weight for part in self.parts]

    def loss_weight(self, index: int) -> float:
        """The factor of a row's loss, without reading the row but for its weight. Raises RowError if that is none."""
        part, row = self._place(index)
        return part.source.loss_weight * part.weight(row)

    def order(self, seed: int, batch_size: int, buckets=None) -> Order:
        """Raises InputError: see `Order`."""
        weights = None if None in self.weights else self.weights
        repeats = [part.repeats for part in self.parts]
        return Order(seed, self.lengths, weights, buckets and buckets.of_row, batch_size, repeats)

    def substitutes(self, index: int, k: int, seed: int, buckets=None) -> tuple[list[int], str]:
        """Some rows (of the same bucket) drawn from (seed, k)."""
        rows = np.arange(len(self)) if buckets is None else np.flatnonzero(buckets.of_row == buckets.of_row[index])
        drawn = generator_for(seed, "substitute", k).integers(len(rows), size=NUM_SUBSTITUTES)
        return rows[drawn].tolist(), f"{NUM_SUBSTITUTES} rows be read that were drawn in its place"

    def inspect(self, config: DataConfig) -> dict[str, Any]:
        """Read every row once: refuse what cannot be trained on, and return the data's fingerprint.

        The fingerprint is a SHA-256 over what `Media.check` says of the rows, in order: of images file names, captions
        and bytes. It is remembered: while no file has changed, nothing is read.

        Raises:
            RowError: a row that cannot be read (names the file), unless `data.on_bad_row` is skip.
        """
        media = media_of(config)

        def digest(index: int) -> bytes:
            part, row = self._place(index)
            entry = media.check(part[row], index, config)
            entry += [] if part.weight_rows is None else [_weight_or_null(part, row, config)]
            return hashlib.sha256(json.dumps(entry, default=str).encode()).digest()

        def compute() -> bytes:
            total = hashlib.sha256()
            digests = map_in_threads(digest, range(len(self)))
            for row_digest in progress(digests, len(self), f"Reading the {media.NOUN}"):
                total.update(row_digest)
            return json.dumps({f"num_{media.NOUN}": len(self), "sha256": total.hexdigest()}).encode()

        found = json.loads(remembered("fingerprint.json", compute, lambda: self.identity(config), config))
        names = config.dataset if config.sources is None else ", ".join(source.dataset for source in config.sources)
        return {"dataset": names} | found

    def identity(self, config: DataConfig) -> str:
        """A digest that changes when a file that holds rows or what they name changes, or other rows of them are taken.

        `Dataset._fingerprint` (datasets 5.2) has the paths and modification times of local files; it does not notice a
        file that is changed and given its old time back, nor one that only a row of parquet names. So besides, of
        every file that is read, its `stamp`.
        """
        digest = hashlib.sha256(repr((VERSION, config.on_bad_row, *media_of(config).limits(config))).encode())
        for part in self.parts:
            columns = [getattr(part.source, name) for name in part.source.of_data()]
            files = [stamp(file["filename"]) for file in part.data.cache_files]
            digest.update(repr((part.data._fingerprint, columns, len(part), files)).encode())
            digest.update(b"all" if part.indices is None else part.indices.tobytes())
            digest.update(b"" if part.windows is None else part.windows.tobytes())
            for paths, is_file in part.media.files(part):
                files = [stamp(path) for path, read in zip(paths, is_file, strict=True) if read]
                digest.update(repr(files).encode())
        return digest.hexdigest()


def _weight_or_null(part: SourceRows, row: int, config: DataConfig) -> float | None:
    """For the fingerprint; null where a row without one is skipped."""
    try:
        return part.weight(row)
    except RowError:
        if config.on_bad_row == "stop":
            raise
        return None


def map_rows(config: DataConfig) -> MappedRows:
    """The rows of all sources.

    Raises:
        InputError: a data set, its split or a column is not there, or a line of metadata.jsonl is wrong.
    """
    return open_rows(sources_of(config), config)


def open_rows(sources: list[tuple[str, SourceConfig]], config: DataConfig) -> MappedRows:
    """The rows of sources, each with how errors call it. Raises InputError: see `map_rows`."""
    parts = [(field, *part) for field, source in sources for part in split_by_repeats(field, source)]
    return MappedRows(
        [SourceRows(open_source(field, part, config), part, repeats=repeats) for field, part, repeats in parts]
    )


def split_rows(rows: Rows, config: DataConfig) -> tuple[Rows, MappedRows | None]:
    """(training rows, validation rows or None): `data.validation_split` of the rows, chosen by a hash of
    their lasting names, so that a row stays on its side when others come or go; or those of `data.validation_dataset`.

    Raises:
        InputError: one of the two is empty, or `data.validation_dataset` cannot be loaded.
    """
    if config.validation_dataset is not None:
        return rows, open_rows([validation_source(config)], config)
    if not config.validation_split:
        return rows, None
    training, validation = [], []
    for part in rows.parts:
        held_out = np.concatenate([_is_held_out(names, config) for names in part.media.lasting_names(part)])
        # a source of which nothing is held out stays, so that a weight stays in its place
        training.append(dataclasses.replace(part, indices=np.flatnonzero(~held_out)))
        validation.append(dataclasses.replace(part, indices=np.flatnonzero(held_out)))
    training, validation = MappedRows(training), MappedRows(validation)
    if not len(training) or not len(validation):
        raise InputError(
            f"data.validation_split: {config.validation_split} of {len(rows)} {media_of(config).NOUN} leaves "
            f"{len(training)} to train on and {len(validation)} to validate on, as the digests of their names choose: "
            f"take a {'smaller' if len(validation) else 'larger'} share, 0, or a data.validation_dataset"
        )
    return training, validation


def _is_held_out(names: list[str], config: DataConfig) -> np.ndarray:
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, ">u8") / 2**64 < config.validation_split


def read_captions(rows: MappedRows, config: DataConfig) -> Iterator[list[str]]:
    """The captions of row after row as the model is told them, without their content. Raises RowError if they cannot be
    read, unless such rows are skipped: then they have none."""
    for index in range(len(rows)):
        row = rows[index]
        try:
            yield [complete(caption, config) for caption in captions_of(row.captions, row.name)]
        except RowError:
            if config.on_bad_row == "stop":
                raise
            yield []


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, in order; a million items are not a million waiting tasks."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), 1024):
            yield from pool.map(function, items[start : start + 1024])
