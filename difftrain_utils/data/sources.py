"""Where rows come from: image folders, parquet, arrow and WebDataset files, hub data sets, drawn shapes."""

import contextlib
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from difftrain_utils.builtins.shapes import SHAPE_SETS, draw_shape
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.errors import InputError, RunError, blame
from difftrain_utils.files import local_path

NUM_BUILTIN_SHAPES = 1800
VALIDATION = "data.validation_dataset"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FILE_KINDS = ("tar", "parquet", "arrow")  # what datasets recognises in a local folder by itself


def sources_of(config: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources of a run, each with how errors call it: `data`, or `data.sources[0]`, …"""
    if config.sources is not None:
        return [(f"data.sources[{i}]", source) for i, source in enumerate(config.sources)]
    return [("data", SourceConfig(config.dataset, config.split, config.image_column, config.caption_column))]


def validation_source(config: DataConfig) -> tuple[str, SourceConfig]:
    """`data.validation_dataset` as a source."""
    return VALIDATION, SourceConfig(config.validation_dataset, config.split, config.image_column, config.caption_column)


def field_of(source: str, name: str) -> str:
    """How errors call a field of what they call `source`; the validation data set has its columns from data."""
    if source == VALIDATION:
        return VALIDATION if name == "dataset" else f"data.{name}"
    return f"{source}.{name}"


def caption_columns(source: SourceConfig) -> list[str]:
    """`caption_column` as a list."""
    return [source.caption_column] if isinstance(source.caption_column, str) else source.caption_column


def open_source(field: str, source: SourceConfig, config: DataConfig) -> datasets.Dataset:
    """The images, undecoded ({"bytes", "path"}), and the captions of a source, mapped into memory.

    Raises:
        InputError: the data set, its split or a column is not there, or a line of metadata.jsonl is wrong.
    """
    name = source.dataset
    if name in SHAPE_SETS:
        data = draw_shapes(name, config.resolution)
    elif name.startswith("builtin:"):
        raise InputError(f"{field_of(field, 'dataset')}: no such builtin: {name!r}; there is {', '.join(SHAPE_SETS)}")
    else:
        folder = local_path(name)
        with _blame_cache(), blame(cannot_load(field, source), Exception):  # whatever stops datasets
            if (folder / "state.json").is_file():
                data = datasets.load_from_disk(str(folder))  # by save_to_disk: it has no splits
            elif (folder / "dataset_dict.json").is_file():
                data = datasets.load_from_disk(str(folder / source.split))
            else:
                data = datasets.load_dataset(**load_arguments(field, source, config), split=source.split)
    check_columns(data, field, source)
    if len(data) == 0:
        raise InputError(f"{field_of(field, 'dataset')}: {name} has no images")
    return used_columns(data, source)


@contextlib.contextmanager
def _blame_cache() -> Iterator[None]:
    """Raise RunError if it is the cache, where datasets keeps what it has read, that stops it from loading a source."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                place = Path(str(cause.filename or ""))
                if cause.errno in FULL or place in (cache, *cache.parents) or cache in place.parents:
                    raise RunError(f"cannot write the cache {cache} (HF_DATASETS_CACHE): {cause.strerror}") from error
            cause = cause.__cause__
        raise


def cannot_load(field: str, source: SourceConfig) -> str:
    """How the error begins if a source cannot be opened."""
    is_folder = os.path.isdir(local_path(source.dataset))
    return f"{field_of(field, 'dataset')}: cannot load {source.dataset!r}" + (
        "" if is_folder else ", which is no folder here"
    )


def load_arguments(field: str, source: SourceConfig, config: DataConfig) -> dict[str, str]:
    """How `datasets` is to load a source: an image folder, a folder with files that it knows, or a hub name.

    Raises:
        InputError: the folder is none of these, or a line of its metadata.jsonl is wrong.
    """
    folder = local_path(source.dataset)
    if metadata := find_metadata(source):
        check_metadata(metadata, field, source, config)
        return {"path": "imagefolder", "data_dir": str(folder)}
    if folder.is_dir() and not any(next(folder.rglob(f"*.{kind}"), None) for kind in FILE_KINDS):
        raise InputError(
            f"{field_of(field, 'dataset')}: {folder} has no metadata.jsonl (and no parquet, arrow or tar files)"
        )
    return {"path": str(folder) if folder.is_dir() else source.dataset}


def check_columns(data: datasets.Dataset | datasets.IterableDataset, field: str, source: SourceConfig) -> None:
    """Raise InputError unless the columns are there, and that of the images holds images."""
    name, columns = source.dataset, data.column_names
    for column, asked_by in (
        (source.image_column, "image_column"),
        *((c, "caption_column") for c in caption_columns(source)),
    ):
        if find_column(data, column) is None:
            raise InputError(
                f"{field_of(field, asked_by)}: no column {column!r} in {name}; it has {', '.join(columns)}"
            )
    feature = data.features.get(source.image_column)
    is_bytes = feature == datasets.Value("binary") or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    if not isinstance(feature, datasets.Image) and not (is_bytes and isinstance(data, datasets.Dataset)):
        hint = " (of a stream, cast it with datasets.Image before it is written)" if is_bytes else ""
        column = f"column {source.image_column!r} of {name}"
        raise InputError(f"{field_of(field, 'image_column')}: {column} does not hold images, but {feature!r:.80}{hint}")


def used_columns(data, source: SourceConfig):
    """A data set of the images, undecoded, and the captions: other columns would be read with each row."""
    used = dict.fromkeys([source.image_column, *(find_column(data, c)[0] for c in caption_columns(source))])
    return data.select_columns(list(used)).cast_column(source.image_column, datasets.Image(decode=False))


def find_column(data: datasets.Dataset, name: str) -> list[str] | None:
    """The path to a column: its name, or a column of structs and a field of it (json.caption); None: not there."""
    if name in data.column_names:  # a tar's field may have a dot: seg.png
        return [name]
    path, features = name.split("."), data.features
    for part in path:
        if not isinstance(features, dict) or part not in features:
            return None
        features = features[part]
    return path


def caption_features(data, source: SourceConfig) -> list[tuple[list[str], Any]]:
    """The path to each caption column (`find_column`), and what `datasets` says that it holds."""
    found = []
    for column in caption_columns(source):
        path, feature = find_column(data, column), data.features
        for part in path:
            feature = feature[part]
        found.append((path, feature))
    return found


def draw_shapes(name: str, resolution: int) -> datasets.Dataset:
    """A built-in data set as PNGs in memory, with the columns `image` and `text`."""
    images, captions = [], []
    for index in range(NUM_BUILTIN_SHAPES):
        image, caption = draw_shape(index, resolution, captions=SHAPE_SETS[name])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        images.append({"bytes": buffer.getvalue(), "path": f"{index:06d}.png"})
        captions.append(caption)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)


def find_metadata(source: SourceConfig) -> Path | None:
    """The `metadata.jsonl` of an image folder; None if the source is something else."""
    folder = local_path(source.dataset)
    paths = (folder / "metadata.jsonl", folder / source.split / "metadata.jsonl")
    return next((path for path in paths if path.is_file()), None)


def check_metadata(path: Path, field: str, source: SourceConfig, config: DataConfig) -> None:
    """Raise InputError for the first line that is not what an image folder needs, or (unless they are to be skipped)
    whose image is missing."""
    if source.image_column != "image":
        raise InputError(
            f"{field_of(field, 'image_column')}: an image folder has its images in 'image', got {source.image_column!r}"
        )
    number = 0
    for number, line in metadata_lines(path):
        row = read_metadata_line(line, f"{path} line {number}", field, source)
        if config.on_bad_row == "stop" and not os.path.isfile(os.path.join(path.parent, row["file_name"])):
            raise InputError(f"{path} line {number}: no such file: {row['file_name']}")
    if number == 0:
        raise InputError(f"{path}: has no line; it needs one for each image")


def metadata_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1 on."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def read_metadata_line(line: bytes, line_name: str, field: str, source: SourceConfig) -> dict[str, Any]:
    """A line's object, which has a file name and a caption.

    Raises:
        InputError: it has not, or is no JSON; the message begins with `line_name`, or names it.
    """
    try:
        row = json.loads(line.decode().rstrip())  # so that the column is one of this line
    except json.JSONDecodeError as error:
        raise InputError(f"{line_name}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise InputError(f"{line_name}: not UTF-8") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise InputError(f'{line_name}: needs a "file_name", got {line.decode().strip():.80}')
    if os.path.isabs(row["file_name"]) or os.path.normpath(row["file_name"]).split(os.sep)[0] == "..":
        raise InputError(f"{line_name}: the file must lie in this folder, got {row['file_name']}")
    if not any(column in row or column.split(".")[0] in row for column in caption_columns(source)):
        columns = " or ".join(map(repr, caption_columns(source)))
        raise InputError(
            f"{field_of(field, 'caption_column')}: no {columns} in {line_name}; "
            f"it has {', '.join(sorted(row.keys() - {'file_name'})) or 'only file_name'}"
        )
    return row
