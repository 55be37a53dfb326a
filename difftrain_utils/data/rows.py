"""The rows of the data: one sequence of all sources', which of them are held out, and how an image is read."""

import bisect
import dataclasses
import hashlib
import io
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps, UnidentifiedImageError

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.data.sources import caption_columns, find_column, open_source, sources_of, validation_source
from difftrain_utils.errors import InputError, RowError, one_line

BATCH = 65536  # rows whose paths are in memory at a time
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is an error here: open_image_header


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Image`, and its captions."""

    name: str
    image: dict[str, Any] | None
    captions: Any


@dataclasses.dataclass
class SourceRows:
    """Rows of one source: all, or those that the ascending `indices` (an integer array) choose.

    Not `data.select`, which writes its indices to the disk and looks them up in Arrow for each row.
    """

    data: datasets.Dataset
    source: SourceConfig
    indices: np.ndarray | None = None

    def __post_init__(self):
        self.caption_paths = [find_column(self.data, column) for column in caption_columns(self.source)]

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, Any]:
        """The undecoded image and the captions."""
        row = self.data[index if self.indices is None else int(self.indices[index])]
        captions = join_captions([follow(row, path) for path in self.caption_paths])
        return row[self.source.image_column], captions

    def paths(self) -> Iterator[tuple[list[str | None], np.ndarray]]:
        """The images' paths, and whether they are files that hold the images, some rows at a time."""
        column = self.data.select_columns([self.source.image_column]).with_format("arrow")
        for start in range(0, len(self), BATCH):
            stop = min(start + BATCH, len(self))
            rows = np.arange(start, stop) if self.indices is None else self.indices[start:stop]
            first = int(rows[0])
            images = column[first : int(rows[-1]) + 1][self.source.image_column]
            # the paths alone, not the bytes, which lie in the same column
            paths, content = (pc.struct_field(images, field) for field in ("path", "bytes"))
            take = pa.array(rows - first)
            is_file = pc.and_(pc.is_valid(paths), pc.is_null(content))
            yield paths.take(take).to_pylist(), is_file.take(take).to_numpy(zero_copy_only=False)


class Rows(Sequence):
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
        image, captions = part[within]
        name = image_name(image, within)
        if len(self.parts) > 1 and name == f"row {within}":
            name = f"{part.source.dataset} {name}"
        return Row(name, image, captions)

    @property
    def lengths(self) -> list[int]:
        """The number of rows of each source."""
        return [len(part) for part in self.parts]

    @property
    def weights(self) -> list[float | None]:
        """Each source's weight, as the config has it."""
        return [part.source.weight for part in self.parts]


def follow(row: dict[str, Any], path: str | list[str]) -> Any:
    """What a row has at the path to a column (`find_column`, or a dotted name); None where it has nothing."""
    if isinstance(path, str):
        path = [path] if path in row else path.split(".")
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def join_captions(values: list[Any]) -> Any:
    """A row's captions out of those of its caption columns: of several all that are not null, in one list."""
    if len(values) == 1:
        return values[0]
    return [v for value in values if value is not None for v in (value if isinstance(value, list) else [value])]


def load_data(config: DataConfig) -> Rows:
    """The rows of all sources.

    Raises:
        InputError: a data set, its split or a column is not there, or a line of metadata.jsonl is wrong.
    """
    return Rows([SourceRows(open_source(place, source, config), source) for place, source in sources_of(config)])


def split_data(rows: Rows, config: DataConfig) -> tuple[Rows, Rows | None]:
    """(training rows, validation rows or None): `data.validation_split` of the rows, chosen by a hash of the image's
    file name, so that a row stays on its side when others come or go; or those of `data.validation_dataset`.

    Raises:
        InputError: one of the two is empty, or `data.validation_dataset` cannot be loaded.
    """
    if config.validation_dataset is not None:
        place, source = validation_source(config)
        return rows, Rows([SourceRows(open_source(place, source, config), source)])
    if not config.validation_split:
        return rows, None
    training, validation = [], []
    for part in rows.parts:
        batches = (paths for paths, _ in part.paths())
        held_out = np.concatenate([_is_held_out(paths, i * BATCH, config) for i, paths in enumerate(batches)])
        # a source of which nothing is held out stays, so that a weight stays in its place
        training.append(SourceRows(part.data, part.source, np.flatnonzero(~held_out)))
        validation.append(SourceRows(part.data, part.source, np.flatnonzero(held_out)))
    training, validation = Rows(training), Rows(validation)
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


def read_row(rows: Rows, index: int, config: DataConfig) -> tuple[Image.Image, list[str]]:
    """The decoded image and the captions of a row.

    Raises:
        RowError: the image is missing, damaged or too large, or the caption is no string.
    """
    row = rows[index]
    return open_image(read_bytes(row.image, row.name), row.name), captions_of(row.captions, row.name)


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


def captions_of(value: Any, name: str) -> list[str]:
    """A row's captions: one string, or a list of at least one. Raises RowError if `value` is neither."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise RowError(f"{name}: the caption must be a string or a list of strings, got {value!r:.80}")
    return captions


def open_image_header(file: BinaryIO, name: str) -> Image.Image:
    """Recognise an image without decoding it, reading no more of the file than that takes.

    Raises:
        RowError: it is no image, or one that Pillow would warn of as a decompression bomb.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file)
        pixels = image.width * image.height
    except Image.DecompressionBombError as error:  # of twice the limit; the error tells the size first
        pixels = int(re.search(r"\d+", str(error))[0])
    except UnidentifiedImageError:
        raise RowError(f"{name}: not an image that Pillow knows") from None
    except Exception as error:
        raise RowError(f"{name}: cannot read the image's header: {one_line(error)}") from None
    if limit is not None and pixels > limit:
        raise RowError(f"{name}: an image of {pixels} pixels; the limit is {limit} (Pillow's MAX_IMAGE_PIXELS)")
    return image


def open_image(content: bytes, name: str) -> Image.Image:
    """Decode an image to RGB as a viewer shows it: upright, transparency on white, 16 bits scaled to 8.

    Raises:
        RowError: it cannot be decoded.
    """
    image = open_image_header(io.BytesIO(content), name)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip to white
            return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except MemoryError:  # not the image's fault
        raise
    except Exception as error:  # Pillow's decoders raise all kinds on damaged bytes
        raise RowError(f"{name}: cannot decode the image: {one_line(error)}") from None
