"""Where rows come from: folders of photos, folders of images or videos, parquet, arrow and WebDataset files, hub data
sets, drawn shapes."""

import contextlib
import dataclasses
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
from difftrain_utils.data import texts, videos
from difftrain_utils.data.photos import IMAGE_ENDINGS, is_image, list_files, read_photos, repeats_of
from difftrain_utils.errors import InputError, RunError, blame
from difftrain_utils.files import local_path
from difftrain_utils.media import image, text, video
from difftrain_utils.media.media import media_of

NUM_BUILTIN_SHAPES = 1800
VALIDATION = "data.validation_dataset"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote
FEATURES = {image: datasets.Image, video: datasets.Video}  # of the columns of files
FOLDERS = {image: "image", video: "video"}  # what `datasets` calls a folder with a metadata.jsonl, and its column
FILE_KINDS = ("tar", "parquet", "arrow")  # what datasets recognises in a local folder by itself


def sources_of(config: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources of a run, each with how errors call it: `data`, or `data.sources[0]`, …"""
    if config.sources is not None:
        return [(f"data.sources[{i}]", source) for i, source in enumerate(config.sources)]
    return [("data", _source(config.dataset, config))]


def validation_source(config: DataConfig) -> tuple[str, SourceConfig]:
    """`data.validation_dataset` as a source."""
    return VALIDATION, _source(config.validation_dataset, config)


def _source(dataset: str, config: DataConfig) -> SourceConfig:
    return config.SOURCE(dataset, **{name: getattr(config, name) for name in config.SOURCE.of_data()})


def field_of(source: str, name: str) -> str:
    """How errors call a field of what they call `source`; the validation data set has its columns from data."""
    if source == VALIDATION:
        return VALIDATION if name == "dataset" else f"data.{name}"
    return f"{source}.{name}"


def open_source(field: str, source: SourceConfig, config: DataConfig) -> datasets.Dataset:
    """The rows of a source, files in them undecoded ({"bytes", "path"}), mapped into memory.

    Raises:
        InputError: the data set, its split or a column is not there, or a line of metadata.jsonl is wrong.
    """
    name, photos = source.dataset, photo_folder(field, source) if media_of(source) is image else None
    if photos is not None:
        with blame(cannot_load(field, source), Exception):  # such as names that are no Unicode
            data = read_photos(photos)
    elif name.startswith("builtin:") and media_of(source) is text:
        data = texts.builtin_texts(name, field_of(field, "dataset"))
    elif name.startswith("builtin:") and media_of(source) is video:
        data = videos.builtin_videos(name, field_of(field, "dataset"), config)
    elif name in SHAPE_SETS:
        data = draw_shapes(name, config.resolution)
    elif name.startswith("builtin:"):
        raise InputError(f"{field_of(field, 'dataset')}: no such builtin: {name!r}; there is {', '.join(SHAPE_SETS)}")
    else:
        folder = local_path(name)
        with _blame_cache(), blame(cannot_load(field, source), Exception), texts.blame_file(source):
            if (folder / "state.json").is_file():
                data = datasets.load_from_disk(str(folder))  # by save_to_disk: it has no splits
            elif (folder / "dataset_dict.json").is_file():
                data = datasets.load_from_disk(str(folder / source.split))
            else:
                data = datasets.load_dataset(**load_arguments(field, source, config), split=source.split)
    check_columns(data, field, source)
    if len(data) == 0:
        raise InputError(f"{field_of(field, 'dataset')}: {name} has no {media_of(source).NOUN}")
    if photos is not None:
        check_photo_captions(data, field, source, config)
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
    place = local_path(source.dataset)
    is_here = os.path.isdir(place) or (media_of(source) is text and os.path.isfile(place))
    return f"{field_of(field, 'dataset')}: cannot load {source.dataset!r}" + (
        "" if is_here else ", which is no folder here"
    )


def load_arguments(field: str, source: SourceConfig, config: DataConfig) -> dict[str, str]:
    """How `datasets` is to load a source: an image folder, a folder with files that it knows, or a hub name.

    Raises:
        InputError: the folder is none of these, or of photos, or a line of its metadata.jsonl is wrong; of texts see
            `texts.load_arguments`.
    """
    if media_of(source) is text:
        return texts.load_arguments(source, field_of(field, "dataset"))
    folder = local_path(source.dataset)
    if metadata := find_metadata(source):
        check_metadata(metadata, field, source, config)
        return {"path": f"{FOLDERS[media_of(source)]}folder", "data_dir": str(folder)}
    if media_of(source) is image and photo_folder(field, source) is not None:
        raise InputError(f"data.streaming: {folder} is a folder of photos, which is not read as a stream")
    return {"path": str(folder) if folder.is_dir() else source.dataset}


def photo_folder(field: str, source: SourceConfig) -> Path | None:
    """Where the photos of a source lie: its folder, or the one in it that is called as the split. None if it is none of
    photos: it has a metadata.jsonl, or files that `datasets` knows.

    Raises:
        InputError: the folder has no images and nothing else that could be read, or no such split.
    """
    folder = local_path(source.dataset)
    if not os.path.isdir(folder):
        return None
    with blame(cannot_load(field, source), OSError, ValueError):  # such as a name of a split that none can have
        if find_metadata(source) or any((folder / name).exists() for name in SAVED):
            return None
        files = list_files(folder)
        if any(path.suffix[1:] in FILE_KINDS for path in files):
            return None
        if table := next((path for path in files if path.name == "metadata.csv"), None):
            raise InputError(f"{table}: is not read; make it a metadata.jsonl, or write .txt files beside the images")
        of_split = folder / source.split
        if of_split.is_dir():
            folder = of_split
        elif source.split != "train":
            raise InputError(f"{field_of(field, 'split')}: no folder {source.split!r} in {folder}")
        if not any(is_image(path) and folder in path.parents for path in files):
            raise InputError(
                f"{field_of(field, 'dataset')}: {folder} has no metadata.jsonl (and no parquet, arrow or tar files, "
                f"and no images: {', '.join(IMAGE_ENDINGS)})"
            )
    return folder


def split_by_repeats(field: str, source: SourceConfig) -> list[tuple[SourceConfig, int]]:
    """A source of kohya's folders `<n>_words` as one for each of them, with how often an epoch has its images: n times,
    or where the source has a weight once, and a share of that weight as if they came n times. The words are the caption
    of images without one, unless there is a default. Any other source as it is, once.

    Raises:
        InputError: see `repeats_of`.
    """
    photos = photo_folder(field, source) if media_of(source) is image else None
    folders = {} if photos is None else repeats_of(photos)
    if not folders:
        return [(source, 1)]
    total, split = sum(n * count for n, _, count in folders.values()), []
    for path, (n, words, count) in folders.items():
        weight = source.weight and source.weight * (n * count) / total
        caption = words if source.default_caption is None else source.default_caption
        of_folder = dataclasses.replace(
            source, dataset=str(path), split="train", weight=weight, default_caption=caption
        )
        split.append((of_folder, n if weight is None else 1))
    return split


def check_photo_captions(data: datasets.Dataset, field: str, source: SourceConfig, config: DataConfig) -> None:
    """Raise InputError if photos have no caption, unless such rows are skipped and others have one."""
    captions = zip(*(data[column] for column, _ in media_of(source).text_columns(source)), strict=True)
    missing = [i for i, of_row in enumerate(captions) if all(caption is None for caption in of_row)]
    is_fine = not missing or (config.on_bad_row == "skip" and len(missing) < len(data))
    if source.default_caption is not None or is_fine:
        return
    image = Path(data.with_format("arrow")[missing[0]]["image"][0]["path"].as_py())
    default = f"--{d}" if (d := field_of(field, "default_caption")).startswith("data.d") else f"{d}:"
    raise InputError(
        f"{field_of(field, 'dataset')}: {image} has no caption ({len(missing)} of {len(data)} images have none): write "
        f'{image.stem}.txt beside it or a metadata.jsonl, or take {default} "a photo of …" for all, or let difftrain '
        f"caption {source.dataset} --model … write them"
    )


def check_columns(data: datasets.Dataset | datasets.IterableDataset, field: str, source: SourceConfig) -> None:
    """Raise InputError unless the columns are there, and those of images and masks hold images."""
    name, columns = source.dataset, data.column_names
    media, of_files = media_of(source), media_of(source).file_columns(source)
    for column, asked_by in of_files + media.text_columns(source):
        # what nobody has asked for need not be there if there is another caption for all
        is_default = asked_by == "caption_column" and column == SourceConfig.caption_column
        if find_column(data, column) is None and not (is_default and source.default_caption is not None):
            raise InputError(
                f"{field_of(field, asked_by)}: no column {column!r} in {name}; it has {', '.join(columns)}"
            )
    for column, asked_by in of_files:
        feature = data.features.get(column)
        is_bytes = feature == datasets.Value("binary") or (
            isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        )
        kind = FEATURES[media]
        is_known = isinstance(feature, datasets.Image | kind)  # an image is a video, too
        if not is_known and not (is_bytes and isinstance(data, datasets.Dataset)):
            hint = f" (of a stream, cast it with datasets.{kind.__name__} before it is written)" if is_bytes else ""
            what = f"column {column!r} of {name} does not hold {media.NOUN}, but {feature!r:.80}{hint}"
            raise InputError(f"{field_of(field, asked_by)}: {what}")


def used_columns(data, source: SourceConfig):
    """A data set of the columns that a source names, files undecoded: other columns would be read with each row."""
    of_files = [column for column, _ in media_of(source).file_columns(source)]
    used = dict.fromkeys([*of_files, *(path[0] for path, _ in text_features(data, source))])
    data = data.select_columns(list(used))
    for column in of_files:
        data = data.cast_column(column, FEATURES[media_of(source)](decode=False))
    return data


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


def text_features(data, source: SourceConfig) -> list[tuple[list[str], Any]]:
    """The path to each column of text that is there (`find_column`), and what `datasets` says that it holds."""
    found = []
    for path in filter(None, (find_column(data, column) for column, _ in media_of(source).text_columns(source))):
        feature = data.features
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
    """The `metadata.jsonl` of a folder of images or videos; None if the source is something else."""
    folder = local_path(source.dataset)
    paths = (folder / "metadata.jsonl", folder / source.split / "metadata.jsonl")
    return next((path for path in paths if path.is_file()), None)


def check_metadata(path: Path, field: str, source: SourceConfig, config: DataConfig) -> None:
    """Raise InputError for the first line that is not what such a folder needs, or (unless they are to be skipped)
    whose file is missing."""
    media, kind = media_of(source), FOLDERS[media_of(source)]
    (column, asked_by), *_ = media.file_columns(source)
    if column != kind:
        article = "an" if kind == "image" else "a"
        raise InputError(
            f"{field_of(field, asked_by)}: {article} {kind} folder has its {media.NOUN} in {kind!r}, got {column!r}"
        )
    number = 0
    for number, line in metadata_lines(path):
        row = read_metadata_line(line, f"{path} line {number}", field, source)
        for name in files_of(row, source) if config.on_bad_row == "stop" else ():
            if not os.path.isfile(path.parent / name):
                raise InputError(f"{path} line {number}: no such file: {name}")
    if number == 0:
        raise InputError(f"{path}: has no line; it needs one for each {kind}")


def mask_file(row: dict[str, Any], source: SourceConfig) -> str | None:
    """The file of the mask that a line of metadata.jsonl names, as `datasets` reads it: `mask_file_name` is of the
    column `mask`."""
    name = row.get(f"{source.mask_column}_file_name")
    return name if isinstance(name, str) else None


def files_of(row: dict[str, Any], source: SourceConfig) -> list[str]:
    """The files that a line of metadata.jsonl names."""
    return [name for name in (row["file_name"], mask_file(row, source)) if name is not None]


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
    for name in files_of(row, source):
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
            raise InputError(f"{line_name}: the file must lie in this folder, got {name}")
    columns = [column for column, _ in media_of(source).text_columns(source)]
    if not any(column in row or column.split(".")[0] in row for column in columns) and source.default_caption is None:
        raise InputError(
            f"{field_of(field, 'caption_column')}: no {' or '.join(map(repr, columns))} in {line_name}; "
            f"it has {', '.join(sorted(row.keys() - {'file_name'})) or 'only file_name'}"
        )
    return row
