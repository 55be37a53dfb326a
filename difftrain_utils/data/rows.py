"""The rows of the data: one sequence of all sources', and which of them are held out."""

import bisect
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from difftrain_utils.config.data import OF_A_SOURCE, DataConfig, SourceConfig
from difftrain_utils.data.fingerprint import VERSION, remembered, stamp
from difftrain_utils.data.order import Order
from difftrain_utils.data.sources import (
    caption_features,
    open_source,
    sources_of,
    split_by_repeats,
    validation_source,
)
from difftrain_utils.errors import InputError, RowError, one_line
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.image import open_image, open_image_header, upright_size
from difftrain_utils.media.text import captions_of, complete, label_text
from difftrain_utils.terminal import progress

BATCH = 65536  # rows whose paths are in memory at a time
NUM_SUBSTITUTES = 10  # where more than ten rows in a row cannot be read, the data needs a look


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Image`, its captions, and where its source has
    masks that of its mask, too."""

    name: str
    image: dict[str, Any] | None
    captions: Any
    mask: dict[str, Any] | None = None


class Rows(Protocol):
    """What training asks of its rows, whether they lie on the disk (`MappedRows`) or are read as a stream
    (`StreamedRows`). What an index is, their order says: a row's number, or its place in a stream."""

    has_masks: bool
    """Whether a source has masks."""

    def __getitem__(self, index: Any) -> Row: ...

    def loss_weight(self, index: Any) -> float:
        """The factor of a row's loss, without reading the row."""

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

    def __post_init__(self):
        self.captions = caption_features(self.data, self.source)

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, Any, dict[str, Any] | None]:
        """The undecoded image, the captions and the mask, as a `Row` has them."""
        row = self.data[index if self.indices is None else int(self.indices[index])]
        return row[self.source.image_column], captions_in(row, self.captions, self.source), mask_in(row, self.source)

    def paths(self, name: str | None = None) -> Iterator[tuple[list[str | None], np.ndarray]]:
        """The images' paths, and whether they are files that hold the images, some rows at a time; or those of another
        column of images."""
        name = name or self.source.image_column
        column = self.data.select_columns([name]).with_format("arrow")
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            rows = np.arange(start, stop) if self.indices is None else self.indices[start:stop]
            first = int(rows[0])
            images = column[first : int(rows[-1]) + 1][name]
            # the paths alone, not the bytes, which lie in the same column
            paths, content = (pc.struct_field(images, field) for field in ("path", "bytes"))
            take = pa.array(rows - first)
            is_file = pc.and_(pc.is_valid(paths), pc.is_null(content))
            yield paths.take(take).to_pylist(), is_file.take(take).to_numpy(zero_copy_only=False)


class MappedRows(Sequence):
    """All rows of the sources `parts`, in order; row i is a `Row`.

    The data sets stay mapped from the disk: nothing here grows with the rows, but for the indices of a split.
    """

    def __init__(self, parts: Sequence[SourceRows]):
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(self.lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        part, within = self.parts[number], index - (self._ends[number - 1] if number else 0)
        image, *others = part[within]
        name = image_name(image, within)
        if name == f"row {within}":
            name = f"{part.source.dataset} {name}"
        return Row(name, image, *others)

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
            parts.append(dataclasses.replace(part, indices=chosen))
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
        """The factor of a row's loss, without reading the row."""
        return self.parts[bisect.bisect_right(self._ends, index)].source.loss_weight

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
        """Read every row once: refuse what is no image or no caption, and return the data's fingerprint.

        The fingerprint is a SHA-256 over the rows' file names, captions and bytes of images and masks, in order. Where
        bad rows are skipped, it has their bytes as they are, and null for an image that is not there. It is remembered:
        while no file has changed, nothing is read.

        Raises:
            RowError: an image that Pillow does not know, a caption that is no string, or a mask of another size (names
                the file), unless `data.on_bad_row` is skip.
        """

        def digest(index: int) -> bytes:
            row, content, mask = self[index], None, None
            captions = [row.captions] if isinstance(row.captions, str) else row.captions
            try:
                content = read_bytes(row.image, row.name)
                captions_of(captions, row.name)
                image = open_image_header(io.BytesIO(content), row.name)
                if row.mask is not None:
                    mask = read_bytes(row.mask, mask_name(row))
                    header = open_image_header(io.BytesIO(mask), mask_name(row))
                    check_opaque(header, row)
                    check_mask_size(upright_size(header, mask_name(row)), upright_size(image, row.name), row)
            except RowError:
                if config.on_bad_row == "stop":
                    raise
            # the file's name alone, so that a moved folder keeps its fingerprint
            name = os.path.basename((row.image or {}).get("path") or f"row {index}")
            entry = [name, captions, content if content is None else hashlib.sha256(content).hexdigest()]
            if row.mask is not None:
                entry.append(mask if mask is None else hashlib.sha256(mask).hexdigest())
            return hashlib.sha256(json.dumps(entry, default=str).encode()).digest()

        def compute() -> bytes:
            total = hashlib.sha256()
            for row_digest in progress(map_in_threads(digest, range(len(self))), len(self), "Reading the images"):
                total.update(row_digest)
            return json.dumps({"num_images": len(self), "sha256": total.hexdigest()}).encode()

        found = json.loads(remembered("fingerprint.json", compute, lambda: self.identity(config), config))
        names = config.dataset if config.sources is None else ", ".join(source.dataset for source in config.sources)
        return {"dataset": names} | found

    def identity(self, config: DataConfig) -> str:
        """A digest that changes when a file that holds rows or images changes, or other rows of them are taken.

        `Dataset._fingerprint` (datasets 5.2) has the paths and modification times of local files; it does not notice a
        file that is changed and given its old time back, nor an image that only a row of parquet names. So besides, of
        every file that is read, its `stamp`.
        """
        digest = hashlib.sha256(repr((VERSION, config.on_bad_row, Image.MAX_IMAGE_PIXELS)).encode())
        for part in self.parts:
            columns = [getattr(part.source, name) for name in OF_A_SOURCE]
            files = [stamp(file["filename"]) for file in part.data.cache_files]
            digest.update(repr((part.data._fingerprint, columns, len(part), files)).encode())
            digest.update(b"all" if part.indices is None else part.indices.tobytes())
            masks = part.paths(part.source.mask_column) if part.source.mask_column else ()
            for paths, is_file in itertools.chain(part.paths(), masks):
                files = [stamp(path) for path, read in zip(paths, is_file, strict=True) if read]
                digest.update(repr(files).encode())
        return digest.hexdigest()


def follow(row: dict[str, Any], path: str | list[str]) -> Any:
    """What a row has at the path to a column (`find_column`, or a dotted name); None where it has nothing."""
    if isinstance(path, str):
        path = [path] if path in row else path.split(".")
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def captions_in(row: dict[str, Any], columns: list[tuple[list[str], Any]], source: SourceConfig) -> Any:
    """A row's captions, in the columns of `caption_features`."""
    return join_captions([label_text(follow(row, path), feature) for path, feature in columns], source)


def mask_in(row: dict[str, Any], source: SourceConfig) -> dict[str, Any] | None:
    """A row's undecoded mask, which may be one that is not there; None where its source has no masks."""
    if source.mask_column is None:
        return None
    return row[source.mask_column] or {"bytes": None, "path": None}


def join_captions(values: list[Any], source: SourceConfig) -> Any:
    """A row's captions out of those of its caption columns: of several all that are not null, in one list; the default
    caption if there are none."""
    captions = [v for value in values if value is not None for v in (value if isinstance(value, list) else [value])]
    if len(values) == 1:
        captions = values[0]
    return source.default_caption if captions in (None, []) and source.default_caption is not None else captions


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
    """(training rows, validation rows or None): `data.validation_split` of the rows, chosen by a hash of the image's
    file name, so that a row stays on its side when others come or go; or those of `data.validation_dataset`.

    Raises:
        InputError: one of the two is empty, or `data.validation_dataset` cannot be loaded.
    """
    if config.validation_dataset is not None:
        return rows, open_rows([validation_source(config)], config)
    if not config.validation_split:
        return rows, None
    training, validation = [], []
    for part in rows.parts:
        batches = (paths for paths, _ in part.paths())
        held_out = np.concatenate([_is_held_out(paths, i * BATCH, config) for i, paths in enumerate(batches)])
        # a source of which nothing is held out stays, so that a weight stays in its place
        training.append(dataclasses.replace(part, indices=np.flatnonzero(~held_out)))
        validation.append(dataclasses.replace(part, indices=np.flatnonzero(held_out)))
    training, validation = MappedRows(training), MappedRows(validation)
    if not len(training) or not len(validation):
        raise InputError(
            f"data.validation_split: {config.validation_split} of {len(rows)} images leaves {len(training)} to train "
            f"on and {len(validation)} to validate on"
        )
    return training, validation


def _is_held_out(paths: list[str | None], start: int, config: DataConfig) -> np.ndarray:
    names = (os.path.basename(image_name({"path": path}, start + i)) for i, path in enumerate(paths))
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, ">u8") / 2**64 < config.validation_split


def read_captions(rows: MappedRows, config: DataConfig) -> Iterator[list[str]]:
    """The captions of row after row as the model is told them, without the images. Raises RowError if they cannot be
    read, unless such rows are skipped: then they have none."""
    for index in range(len(rows)):
        row = rows[index]
        try:
            yield [complete(caption, config) for caption in captions_of(row.captions, row.name)]
        except RowError:
            if config.on_bad_row == "stop":
                raise
            yield []


def read_row(rows: Rows, index: int) -> tuple[Image.Image, list[str]]:
    """The decoded image and the captions of a row.

    Raises:
        RowError: the image is missing, damaged or too large, or the caption is no string.
    """
    row = rows[index]
    return open_image(read_bytes(row.image, row.name), row.name), captions_of(row.captions, row.name)


def read_mask(row: Row, image: Image.Image) -> Image.Image:
    """The decoded mask of a row's image, greyscale and of its size; all white where its source has no masks.

    Raises:
        RowError: the mask is missing, damaged, transparent or of another size.
    """
    if row.mask is None:
        return Image.new("L", image.size, 255)
    content = read_bytes(row.mask, mask_name(row))
    check_opaque(open_image_header(io.BytesIO(content), mask_name(row)), row)
    mask = open_image(content, mask_name(row)).convert("L")
    check_mask_size(mask.size[::-1], image.size[::-1], row)
    return mask


def mask_name(row: Row) -> str:
    """How errors call a row's mask."""
    return f"{row.name}: mask {row.mask['path'] or ''}".rstrip()


def check_opaque(header: Image.Image, row: Row) -> None:
    """Raise RowError of a mask with transparency: on white, as images are laid, all of it would count."""
    if header.has_transparency_data:
        raise RowError(f"{mask_name(row)}: must be greyscale, white where the image counts, and has transparency")


def check_mask_size(mask: tuple[int, int], image: tuple[int, int], row: Row) -> None:
    """Raise RowError unless a row's mask is as large, (height, width), as its image."""
    if mask != image:
        sizes = [f"{width} × {height}" for height, width in (image, mask)]
        raise RowError(f"{mask_name(row)}: must have the image's {sizes[0]} pixels, got {sizes[1]}")


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, in order; a million items are not a million waiting tasks."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), 1024):
            yield from pool.map(function, items[start : start + 1024])


def image_name(value: dict[str, Any] | None, index: int) -> str:
    """How errors call a row's image."""
    return (value or {}).get("path") or f"row {index}"


def read_bytes(value: dict[str, Any] | None, name: str) -> bytes:
    """The content of an undecoded `datasets.Image`, which is in the row, in a file or (of a stream) at a URL.

    Raises:
        RowError: there is none, or its file cannot be read.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise RowError(f"{name}: no image")
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        if "://" not in value["path"]:
            return Path(value["path"]).read_bytes()
        with fsspec.open(value["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise RowError(f"{name}: {error.strerror or one_line(error)}") from None
