"""A data set read as a stream, for one that does not fit on the disk, or that many processes share.

Here, too, sample k is a function of (config, seed, k): which row it has, `Lanes` says. The rows are read unit by unit,
those of a lane's next window while its present one is used.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.fingerprint import cache_folder, remembered
from difftrain_utils.data.lanes import Lanes, Place, Window
from difftrain_utils.data.remote import Reader, StoredFile, find_file, is_remote, list_urls
from difftrain_utils.data.rows import map_in_threads
from difftrain_utils.data.sources import (
    FILE_KINDS,
    cannot_load,
    check_columns,
    field_of,
    load_arguments,
    sources_of,
    text_features,
    used_columns,
    weight_of,
    weight_path,
)
from difftrain_utils.data.units import FEATURE_FINDERS, FINDERS, NAME, VERSION, FileRows, TableRows, Units, find_units
from difftrain_utils.errors import InputError, RowError, blame
from difftrain_utils.media import text
from difftrain_utils.media.media import Row, media_of

END_BYTES = 2**16  # of each end of a file, for its digest: the end of a parquet file says where all its columns lie
READERS = 4  # threads of a process


@dataclass
class StreamedSource:
    """The units of one source, and what of its columns is text."""

    source: SourceConfig
    rows: FileRows | TableRows
    texts: list[tuple[list[str], Any]]
    weight_path: list[str] | None
    num_files: int
    sha256: str

    def row(self, content: dict[str, Any]) -> Row:
        """A row as it is stored."""
        return media_of(self.source).row_of(content, content[NAME], self.source, self.texts)

    def weight(self, content: dict[str, Any]) -> float:
        """Its own weight, 1 where the source names no column of them. Raises RowError if it is none."""
        return 1.0 if self.weight_path is None else weight_of(content, self.weight_path, content[NAME])


def open_stream(config: DataConfig) -> "StreamedRows":
    """The rows of `data.dataset` or `data.sources` as a stream. Looks for the units of all files, unless it is known
    from an earlier run what they have, and reads the first unit. The main process does it for all.

    Raises:
        InputError: a data set, its split or a column is not there, has no rows, or a file is damaged.
        RowError: a first row cannot be read, unless `data.on_bad_row` is skip.
    """
    reader = Reader(cache_folder(config) / "stream", config.stream_cache_gb * 1e9)
    rows = StreamedRows([_open_source(field, source, config, reader) for field, source in sources_of(config)], config)
    for opened in rows.sources if config.on_bad_row == "stop" else ():
        content = opened.rows.read(0)[0]
        if isinstance(content, RowError):
            raise content
        media_of(config).check(opened.row(content), 0, config)
        opened.weight(content)
    return rows


def _open_source(field: str, source: SourceConfig, config: DataConfig, reader: Reader) -> StreamedSource:
    culprit = field_of(field, "dataset")
    with blame(cannot_load(field, source), Exception):  # whatever stops datasets
        if is_remote(source.dataset):
            paths, arguments = _urls(source, culprit)
        else:
            paths, arguments = None, load_arguments(field, source, config)
        builder = datasets.load_dataset_builder(**arguments)
        data = builder.as_streaming_dataset(split=source.split)
        paths = paths or list(builder.config.data_files[source.split])
    kind = type(builder).__module__.rpartition(".")[2]
    if data.features is None and kind in FEATURE_FINDERS:  # datasets would find them out by reading on
        with blame(culprit, OSError, ValueError):
            data = data.cast(FEATURE_FINDERS[kind](find_file(paths[0]), reader))
    check_columns(data, field, source)
    data = used_columns(data, source)
    with blame(culprit, OSError):
        if kind in ("imagefolder", "videofolder", "audiofolder"):
            files = list(map_in_threads(find_file, paths))
            rows: FileRows | TableRows = _folder(data, source)
        elif kind in FINDERS:
            files, units = _units(kind, paths, culprit, config, reader)
            rows = FileRows(kind, files, units, data.features, reader)
        else:
            kinds = "parquet, arrow, WebDataset tar, JSONL and text files, and folders with a metadata.jsonl"
            raise InputError(f"{culprit}: {source.dataset} is of {kind}; a stream reads {kinds}")
        if rows.units.rows.sum() == 0:
            raise InputError(f"{culprit}: {source.dataset} has no {media_of(source).NOUN}")
        sha256 = files_digest(files, reader)
    return StreamedSource(source, rows, text_features(data, source), weight_path(data, source), len(files), sha256)


def _urls(source: SourceConfig, culprit: str) -> tuple[list[str], dict[str, Any]]:
    """The files of a URL, and how `datasets` opens the first, which says what columns there are."""
    is_text = media_of(source) is text  # of others a JSONL file is a metadata.jsonl, whose files are not in it
    urls = list_urls(source.dataset, kinds := (*FILE_KINDS, "jsonl") if is_text else FILE_KINDS)
    if not urls:
        here = "" if is_text else "; a folder with a metadata.jsonl must be here, or a data set on the hub"
        raise InputError(f"{culprit}: {source.dataset} has no files that end in {', '.join(kinds)}{here}")
    ending = urls[0].rpartition(".")[2]
    if other := next((url for url in urls if not url.endswith(f".{ending}")), None):
        raise InputError(f"{culprit}: {source.dataset} has files of several kinds, {urls[0]} and {other}")
    kind = {"tar": "webdataset", "jsonl": "json"}.get(ending, ending)
    return urls, {"path": kind, "data_files": {source.split: urls[:1]}}


def _folder(data: datasets.IterableDataset, source: SourceConfig) -> TableRows:
    """The lines of its metadata.jsonl: its images, videos or sounds are files, here or at a URL, read one by one."""
    return TableRows([row | {NAME: f"{source.dataset} row {i}"} for i, row in enumerate(data)])


def _units(
    kind: str, paths: list[str], culprit: str, config: DataConfig, reader: Reader
) -> tuple[list[StoredFile], Units]:
    """The files, and their units as an earlier run has found them, or as they are now."""
    files: list[StoredFile] = []

    def identify() -> str:
        files[:] = map_in_threads(find_file, paths)
        return hashlib.sha256(repr((VERSION, kind, files)).encode()).hexdigest()

    def compute() -> bytes:
        return find_units(kind, files, culprit, reader).to_bytes()

    return files, Units.from_bytes(remembered("units.safetensors", compute, identify, config))


class StreamedRows:
    """`rows[place]` is the row that an order (`Lanes`) has for a sample. Keys should grow: of each lane a window is
    held, as far as it was not used yet, and the units of its next one that are read meanwhile; what was used is read
    again where somebody asks for it once more. Of the files, a process reads those of the lanes that it is asked for.
    """

    def __init__(self, sources: Sequence[StreamedSource], config: DataConfig):
        self.sources, self.config = list(sources), config
        self._forget()

    def __getitem__(self, place: Place) -> Row:
        return self.sources[place.window.source].row(self._read_row(place))

    def _read_row(self, place: Place) -> dict[str, Any]:
        """Its columns. Raises RowError if it cannot be read."""
        window, position = place
        units = self._hold(window, position)
        unit, row = int(window.units[position]), int(window.rows[position])
        content = units[unit].result()[row]
        if content is None:
            units[unit] = self._read(window.source, unit)
            content = units[unit].result()[row]
        if isinstance(content, RowError):
            raise content
        return content

    def __getstate__(self):  # for the workers of a data loader where they are not forked
        return {"sources": self.sources, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return sum(int(opened.rows.units.rows.sum()) for opened in self.sources)

    @property
    def has_masks(self) -> bool:
        """Whether a source has masks."""
        return any(opened.source.mask_column for opened in self.sources)

    def loss_weight(self, index: Place) -> float:
        """The factor of a row's loss. Raises RowError if its weight is none, or cannot be read."""
        opened = self.sources[index.window.source]
        own = 1.0 if opened.weight_path is None else opened.weight(self._read_row(index))
        return opened.source.loss_weight * own

    def order(self, seed: int, batch_size: int, buckets=None) -> Lanes:
        """Raises InputError: see `Lanes`."""
        weights = [opened.source.weight for opened in self.sources]
        units = [(opened.rows.units.of_file, opened.rows.units.rows) for opened in self.sources]
        shares, config = None if None in weights else weights, self.config
        return Lanes(seed, units, batch_size, config.lanes, config.shuffle_buffer, shares, config.lanes_fixed)

    def substitutes(self, index: Place, k: int, seed: int, buckets=None) -> tuple[Iterator[Place], str]:
        """The other rows of the window, because others would have to be read."""
        size = len(index.window)
        others = (Place(index.window, (index.position + step) % size) for step in range(1, size))
        return others, f"any of the {size} rows that are shuffled with it"

    def inspect(self, config: DataConfig) -> dict[str, Any]:
        """The fingerprint: a SHA-256 over the files, because nobody has read all rows."""
        names = ", ".join(opened.source.dataset for opened in self.sources)
        sha256, *others = (opened.sha256 for opened in self.sources)
        if others:
            sha256 = hashlib.sha256("".join([sha256, *others]).encode()).hexdigest()
        num_files = sum(opened.num_files for opened in self.sources)
        return {"dataset": names, "streaming": True, "num_files": num_files, "sha256": sha256}

    def _forget(self) -> None:
        self._process, self._pool = os.getpid(), ThreadPoolExecutor(READERS)
        self._held: dict[int, tuple[Window, int, dict[int, Future]]] = {}  # of each lane, up to which place

    def _hold(self, window: Window, position: int) -> dict[int, Future]:
        """The units of a window, and as many of the next as the part of this one that is used."""
        if self._process != os.getpid():  # a forked worker has no threads
            self._forget()
        held, used, units = self._held.get(window.lane, (None, 0, {}))
        if held is not window:
            needed = dict.fromkeys([*window.units.tolist(), *window.ahead])
            units, used = {unit: units[unit] for unit in needed if unit in units}, 0
            for unit in dict.fromkeys(window.units.tolist()):
                self._ask(window.source, unit, units)
        for unit in window.ahead[: -(-len(window.ahead) * (position + 1) // len(window))]:
            self._ask(window.source, unit, units)
        for before in range(used, position):
            unit = units[int(window.units[before])]
            if unit.done() and unit.exception() is None:
                unit.result()[int(window.rows[before])] = None
        self._held[window.lane] = window, max(used, position), units
        return units

    def _ask(self, source: int, unit: int, units: dict[int, Future]) -> None:
        if unit not in units:
            units[unit] = self._read(source, unit)

    def _read(self, source: int, unit: int) -> Future:
        return self._pool.submit(self.sources[source].rows.read, unit)


def files_digest(files: Sequence[StoredFile], reader: Reader) -> str:
    """SHA-256 over the names, sizes and contents of `files`, in order, without reading all of them.

    The content is described by the file system's own digest, on the hub, and else by the two ends of the file. The
    names are without their folders, so that a moved data set keeps its digest.
    """
    digest = hashlib.sha256()
    for entry in map_in_threads(partial(_describe, reader=reader), files):
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _describe(file: StoredFile, reader: Reader) -> list[Any]:
    content = file.digest
    if content is None:
        ends = [(0, min(END_BYTES, file.size)), (max(0, file.size - END_BYTES), file.size)]
        content = hashlib.sha256(b"".join(reader.read(file, start, stop) for start, stop in ends)).hexdigest()
    return [file.name, file.size, content]
