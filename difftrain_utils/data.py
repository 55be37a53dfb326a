"""The rows of the data: where they come from, whether they are fit to train on, and how an image is read."""

import dataclasses
import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageOps, UnidentifiedImageError

from difftrain_utils.config import DataConfig
from difftrain_utils.errors import InputError, RowError, blame, one_line
from difftrain_utils.shapes import draw_shape

NUM_BUILTIN_SHAPES = 1800
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is an error here: open_image_header


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded image, and what should be its captions."""

    name: str
    image: dict[str, Any] | None
    captions: Any


def load_data(config: DataConfig) -> datasets.Dataset:
    """The rows of `data.dataset`, with images undecoded ({"bytes", "path"}).

    Raises:
        InputError: the data set, its split or a column is not there, or a line of metadata.jsonl is wrong.
    """
    if config.dataset == "builtin:shapes":
        data = draw_shapes(config.resolution)
    elif config.dataset.startswith("builtin:"):
        raise InputError(f"data.dataset: no such builtin: {config.dataset!r}; there is builtin:shapes")
    else:
        arguments = load_arguments(config, ("parquet", "arrow"))
        with blame(cannot_load(config), Exception):  # whatever stops datasets
            data = datasets.load_dataset(**arguments, split=config.split)
    check_columns(data, config)
    if len(data) == 0:
        raise InputError(f"data.dataset: {config.dataset} has no images")
    return data.cast_column(config.image_column, datasets.Image(decode=False))


def load_arguments(config: DataConfig, kinds: tuple[str, ...]) -> dict[str, str]:
    """How `datasets` is to load `data.dataset`: an image folder, a folder with files of one of `kinds`, or a hub name.

    Raises:
        InputError: the folder is none of these, or a line of its metadata.jsonl is wrong.
    """
    folder = Path(config.dataset).expanduser()
    if not folder.is_dir():
        return {"path": config.dataset}
    if (metadata := find_metadata(config)) is not None:
        check_metadata(metadata, config)
        return {"path": "imagefolder", "data_dir": str(folder)}
    if any(next(folder.rglob(f"*.{kind}"), None) for kind in kinds):
        return {"path": str(folder)}
    files = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    raise InputError(f"data.dataset: {folder} has no metadata.jsonl (and no {files} files)")


def cannot_load(config: DataConfig) -> str:
    is_folder = Path(config.dataset).expanduser().is_dir()
    return f"data.dataset: cannot load {config.dataset!r}" + ("" if is_folder else ", which is no folder here")


def check_columns(data: datasets.Dataset | datasets.IterableDataset, config: DataConfig) -> None:
    """Raise InputError unless there is a column of images and one of captions."""
    for name, field in ((config.image_column, "image_column"), (config.caption_column, "caption_column")):
        if name not in data.column_names:
            raise InputError(
                f"data.{field}: no column {name!r} in {config.dataset}; it has {', '.join(data.column_names)}"
            )
    if not isinstance(data.features[config.image_column], datasets.Image):
        raise InputError(f"data.image_column: column {config.image_column!r} of {config.dataset} does not hold images")


def split_data(data: datasets.Dataset, config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(training rows, validation rows or None): `data.validation_split` of the rows, chosen by a hash of the image's
    file name, so that a row stays on its side when others come or go; or those of `data.validation_dir`.

    Raises:
        InputError: one of the two is empty, or `data.validation_dir` cannot be loaded.
    """
    if config.validation_dir is not None:
        return data, load_data(dataclasses.replace(config, dataset=config.validation_dir))
    if not config.validation_split:
        return data, None
    # the paths alone: in parquet the images lie in the same column
    paths = pc.struct_field(data.with_format("arrow")[:][config.image_column], "path").to_pylist()
    names = [Path(image_name({"path": path}, i)).name for i, path in enumerate(paths)]
    held_out = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    training = [i for i, share in enumerate(held_out) if share >= config.validation_split]
    validation = [i for i, share in enumerate(held_out) if share < config.validation_split]
    if not training or not validation:
        raise InputError(
            f"data.validation_split: {config.validation_split} of {len(data)} images leaves {len(training)} to train "
            f"on and {len(validation)} to validate on"
        )
    return data.select(training), data.select(validation)


def draw_shapes(resolution: int) -> datasets.Dataset:
    """`builtin:shapes` as a data set of PNGs in memory, with the columns `image` and `text`."""
    images, captions = [], []
    for index in range(NUM_BUILTIN_SHAPES):
        image, caption = draw_shape(index, resolution)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        images.append({"bytes": buffer.getvalue(), "path": f"{index:06d}.png"})
        captions.append(caption)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)


def find_metadata(config: DataConfig) -> Path | None:
    """The `metadata.jsonl` of an image folder; None if `data.dataset` is something else."""
    folder = Path(config.dataset).expanduser()
    paths = (folder / "metadata.jsonl", folder / config.split / "metadata.jsonl")
    return next((path for path in paths if path.is_file()), None)


def check_metadata(path: Path, config: DataConfig) -> None:
    """Raise InputError for the first line that is not what an image folder needs, or (unless they are to be skipped)
    whose image is missing."""
    if config.image_column != "image":
        raise InputError(f"data.image_column: an image folder has its images in 'image', got {config.image_column!r}")
    for number, line in metadata_lines(path):
        row = read_metadata_line(line, f"{path} line {number}", config)
        if config.on_bad_row == "stop" and not (path.parent / row["file_name"]).is_file():
            raise InputError(f"{path} line {number}: no such file: {row['file_name']}")


def metadata_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1 on."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def read_metadata_line(line: bytes, place: str, config: DataConfig) -> dict[str, Any]:
    """A line's object, which has a file name and a caption.

    Raises:
        InputError: it has not, or is no JSON; the message begins with `place`, or names it.
    """
    try:
        row = json.loads(line.decode().rstrip())  # so that the column is one of this line
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise InputError(f"{place}: not UTF-8") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f'{place}: needs a "file_name", got {line.decode().strip():.80}')
    if config.caption_column not in row:
        raise InputError(
            f"data.caption_column: no {config.caption_column!r} in {place}; "
            f"it has {', '.join(sorted(row.keys() - {'file_name'})) or 'only file_name'}"
        )
    return row


def inspect_data(data: datasets.Dataset, config: DataConfig) -> dict[str, Any]:
    """Read every row once: refuse what is no image or no caption, and return the data's fingerprint.

    The fingerprint is a SHA-256 over the rows' file names, captions and image bytes, in order. Where bad rows are
    skipped, it has their bytes as they are, and null for an image that is not there.

    Raises:
        RowError: an image that Pillow does not know, or a caption that is no string (names the file), unless
            `data.on_bad_row` is skip.
    """

    if not isinstance(data, datasets.Dataset):  # a stream, which is not read as a whole
        return data.inspect()

    def digest(index: int) -> bytes:
        row = data[index]
        name = image_name(row[config.image_column], index)
        captions, content = row[config.caption_column], None
        captions = [captions] if isinstance(captions, str) else captions
        try:
            content = read_bytes(row[config.image_column], name)
            captions_of(captions, name)
            open_image_header(content, name)
        except RowError:
            if config.on_bad_row == "stop":
                raise
        # the file's name alone, so that a moved folder keeps its fingerprint
        entry = [Path(name).name, captions, content if content is None else hashlib.sha256(content).hexdigest()]
        return hashlib.sha256(json.dumps(entry, default=str).encode()).digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(data), 1024):  # a million rows are not a million waiting tasks
            for row_digest in pool.map(digest, range(start, min(start + 1024, len(data)))):
                total.update(row_digest)
    return {"dataset": config.dataset, "num_images": len(data), "sha256": total.hexdigest()}


def inspect_splits(
    data: datasets.Dataset, validation_data: datasets.Dataset | None, config: DataConfig
) -> dict[str, dict[str, Any]]:
    """What `inspect_data` returns for the training rows and, where there are any, the validation rows."""
    splits = {"train": data, "validation": validation_data}
    return {name: inspect_data(split, config) for name, split in splits.items() if split is not None}


def read_row(data: datasets.Dataset, index: int, config: DataConfig) -> tuple[Image.Image, list[str]]:
    """The decoded image and the captions of a row.

    Raises:
        RowError: the image is missing, damaged or too large, or the caption is no string.
    """
    row = row_at(data, index, config)
    return open_image(read_bytes(row.image, row.name), row.name), captions_of(row.captions, row.name)


def row_at(data, index: int, config: DataConfig) -> Row:
    """Row `index` of a data set; of a stream, the row of sample `index`."""
    row = data[index]
    if isinstance(row, Row):
        return row
    return Row(image_name(row[config.image_column], index), row[config.image_column], row[config.caption_column])


def image_name(value: dict[str, Any] | None, index: int) -> str:
    """How errors call a row's image."""
    return (value or {}).get("path") or f"row {index}"


def read_bytes(value: dict[str, Any] | None, name: str) -> bytes:
    """The content of an undecoded `datasets.Image`, which is in the row, in a file or (of a stream) at a URL."""
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
    """A row's captions: one string, or a list of at least one."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise RowError(f"{name}: the caption must be a string or a list of strings, got {value!r:.80}")
    return captions


def open_image_header(content: bytes, name: str) -> Image.Image:
    """Recognise an image without decoding it, and refuse one that Pillow would warn of as a decompression bomb."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(io.BytesIO(content))
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
    """Decode an image to RGB as a viewer shows it: upright, transparency on white, 16 bits scaled to 8."""
    image = open_image_header(content, name)
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
