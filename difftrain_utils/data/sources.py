"""Where rows come from: folders of photos, videos or sounds, with captions beside them or a metadata.jsonl, parquet,
arrow and WebDataset files, hub data sets, and what is built in."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from difftrain_utils.builtins import scenes, shapes
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.rows import RowsSource
from difftrain_utils.data import sounds, texts, videos
from difftrain_utils.data.photos import ENDINGS, NOUNS, STORED, is_photo, list_files, read_photos, repeats_of
from difftrain_utils.errors import InputError, RowError, RunError, blame
from difftrain_utils.files import local_path
from difftrain_utils.media import audio, image, pairs, text, video
from difftrain_utils.media.captions import follow
from difftrain_utils.media.media import media_of

WEIGHTS_AT_ONCE = 10_000
BUILTIN_IMAGES = {  # how row (index, size in pixels) is drawn, with its caption, and how many rows there are
    "builtin:shapes": (shapes.draw_shape, 1800),
    "builtin:placed-shapes": (partial(shapes.draw_shape, captions=shapes.PLACED), 1800),
    "builtin:shape-pairs": (shapes.draw_pair, 1800),
    "builtin:scenes": (scenes.draw_scene, scenes.NUM_IMAGES),
}
VALIDATION = "data.validation_dataset"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote
# Of the columns of files
FEATURES = {image: datasets.Image, pairs: datasets.Image, video: datasets.Video, audio: datasets.Audio}
# what `datasets` calls a folder, and its column
FOLDERS = {image: "image", pairs: "image", video: "video", audio: "audio"}
WITH_CAPTIONS_BESIDE = (image, video, audio)  # where there is no metadata.jsonl
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
    name, media = source.dataset, media_of(source)
    photos = photo_folder(field, source) if media in WITH_CAPTIONS_BESIDE else None
    if photos is not None:
        with blame(cannot_load(field, source), Exception):  # such as names that are no Unicode
            data = read_photos(photos, FOLDERS[media])
    elif name.startswith("builtin:") and media is text:
        data = texts.builtin_texts(name, field_of(field, "dataset"))
    elif name.startswith("builtin:") and media is video:
        data = videos.builtin_videos(name, field_of(field, "dataset"), config)
    elif name.startswith("builtin:") and media is audio:
        data = sounds.builtin_sounds(name, field_of(field, "dataset"), config)
    elif name in BUILTIN_IMAGES:
        data = draw_builtin(name, config.resolution)
    elif name.startswith("builtin:"):
        raise InputError(
            f"{field_of(field, 'dataset')}: no such builtin: {name!r}; there is {', '.join(BUILTIN_IMAGES)}"
        )
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
        raise InputError(f"{field_of(field, 'dataset')}: {name} has no {media.NOUN}")
    if source.weight_column is not None and config.on_bad_row == "stop":
        check_weights(data, field, source)
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


def load_arguments(field: str, source: SourceConfig, config: DataConfig) -> dict[str, Any]:
    """How `datasets` is to load a source: a folder with a metadata.jsonl, one with files that it knows, or a hub name.

    Raises:
        InputError: it is a file, or a folder that is none of these, or of photos, or a line of its metadata.jsonl is
            wrong; of texts see `texts.load_arguments`.
    """
    media = media_of(source)
    if media is text:
        return texts.load_arguments(source, field_of(field, "dataset"))
    folder = local_path(source.dataset)
    if os.path.isfile(folder):
        raise InputError(f"{field_of(field, 'dataset')}: {folder} is a file, where a folder is needed")
    if metadata := find_metadata(source):
        check_metadata(metadata, field, source, config)
        arguments = {"path": f"{FOLDERS[media]}folder", "data_dir": str(folder)}
    elif photo_folder(field, source) is not None:
        if media is pairs:
            names = " and ".join(f'"{file_key(column)}"' for column, _ in pairs.file_columns(source))
            raise InputError(
                f"{field_of(field, 'dataset')}: {folder} is a folder of photos; of pairs it needs a metadata.jsonl, "
                f"with {names}"
            )
        what = "photos" if media is image else f"{media.NOUN} without a metadata.jsonl"
        raise InputError(f"data.streaming: {folder} is a folder of {what}, which is not read as a stream")
    else:
        arguments = {"path": str(folder) if folder.is_dir() else source.dataset}
    return sounds.with_features(arguments, source.split) if media is audio else arguments


def photo_folder(field: str, source: SourceConfig) -> Path | None:
    """Where the photos, videos or sounds of a source lie: its folder, or the one in it that is called as the split.
    None if it is none of them: it has a metadata.jsonl, or files that `datasets` knows.

    Raises:
        InputError: the folder has none of them and nothing else that could be read, or no such split.
    """
    folder, kind = local_path(source.dataset), FOLDERS[media_of(source)]
    if not os.path.isdir(folder):
        return None
    with blame(cannot_load(field, source), OSError, ValueError):  # such as a name of a split that none can have
        if find_metadata(source) or any((folder / name).exists() for name in SAVED):
            return None
        files = list_files(folder)
        if any(path.suffix[1:] in FILE_KINDS for path in files):
            return None
        if table := next((path for path in files if path.name == "metadata.csv"), None):
            beside = f"write .txt files beside the {NOUNS[kind]}"
            raise InputError(f"{table}: is not read; make it a metadata.jsonl, or {beside}")
        of_split = folder / source.split
        if of_split.is_dir():
            folder = of_split
        elif source.split != "train":
            raise InputError(f"{field_of(field, 'split')}: no folder {source.split!r} in {folder}")
        if not any(is_photo(path, kind) and folder in path.parents for path in files):
            named = f"{field_of(field, 'dataset')}: {folder}"
            for other in ENDINGS:
                if any(is_photo(path, other) and folder in path.parents for path in files):
                    holds = f"holds {NOUNS[other]} and no {NOUNS[kind]}"
                    raise InputError(f"{named} {holds}: train with train_text_to_{other}.py")
            raise InputError(
                f"{named} has no metadata.jsonl (and no parquet, arrow or tar files, and no {NOUNS[kind]}: "
                f"{', '.join(ENDINGS[kind])})"
            )
    return folder


def split_by_repeats(field: str, source: SourceConfig) -> list[tuple[SourceConfig, int]]:
    """A source of kohya's folders `<n>_words` as one for each of them, with how often an epoch has its rows: n times,
    or where the source has a weight once, and a share of that weight as if they came n times. The words are the caption
    of what has none, unless there is a default. Any other source as it is, once.

    Raises:
        InputError: see `repeats_of`.
    """
    media = media_of(source)
    photos = photo_folder(field, source) if media in WITH_CAPTIONS_BESIDE else None
    folders = {} if photos is None else repeats_of(photos, FOLDERS[media])
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
    """Raise InputError if photos, videos or sounds have no caption, unless such rows are skipped and others have
    one."""
    media = media_of(source)
    captions = zip(*(data[column] for column, _ in media.text_columns(source)), strict=True)
    missing = [i for i, of_row in enumerate(captions) if all(caption is None for caption in of_row)]
    is_fine = not missing or (config.on_bad_row == "skip" and len(missing) < len(data))
    if source.default_caption is not None or is_fine:
        return
    path = Path(data.with_format("arrow")[missing[0]][FOLDERS[media]][0]["path"].as_py())
    default = f"--{d}" if (d := field_of(field, "default_caption")).startswith("data.d") else f"{d}:"
    what = "a photo" if media is image else f"a {media.NOUN[:-1]}"
    by_model = f", or let difftrain caption {source.dataset} --model … write them" if media is image else ""
    raise InputError(
        f"{field_of(field, 'dataset')}: {path} has no caption ({len(missing)} of {len(data)} {media.NOUN} have none): "
        f'write {path.stem}.txt beside it or a metadata.jsonl, or take {default} "{what} of …" for all{by_model}'
    )


def check_columns(data: datasets.Dataset | datasets.IterableDataset, field: str, source: SourceConfig) -> None:
    """Raise InputError unless the columns are there, and those of files hold what they should."""
    name, columns = source.dataset, data.column_names
    media, of_files = media_of(source), media_of(source).file_columns(source)
    for column, asked_by in of_files + media.text_columns(source):
        # what nobody has asked for need not be there if there is another caption for all
        is_default = asked_by == "caption_column" and column == SourceConfig.caption_column
        if find_column(data, column) is None and not (is_default and source.default_caption is not None):
            raise InputError(
                f"{field_of(field, asked_by)}: no column {column!r} in {name}; it has {', '.join(columns)}"
            )
    if source.weight_column is not None and weight_path(data, source) is None:
        there = f"no column {source.weight_column!r} in {name}; it has {', '.join(columns)}"
        raise InputError(f"{field_of(field, 'weight_column')}: {there}")
    for column, asked_by in of_files:
        feature = data.features.get(column)
        is_bytes = feature == datasets.Value("binary") or (
            isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        )
        kind = FEATURES[media]
        is_still = media is video and isinstance(feature, datasets.Image)  # which is a video, too
        is_known = isinstance(feature, kind) or is_still
        if not is_known and not (is_bytes and isinstance(data, datasets.Dataset)):
            hint = f" (of a stream, cast it with datasets.{kind.__name__} before it is written)" if is_bytes else ""
            what = f"column {column!r} of {name} does not hold {media.NOUN}, but {feature!r:.80}{hint}"
            raise InputError(f"{field_of(field, asked_by)}: {what}")


def check_weights(data: datasets.Dataset, field: str, source: SourceConfig) -> None:
    """Raise RowError for the first row whose weight is none."""
    path, row = weight_path(data, source), 0
    for values in data.select_columns(path[:1]).iter(WEIGHTS_AT_ONCE):
        for value in values[path[0]]:
            weight_of({path[0]: value}, path, f"{field_of(field, 'weight_column')}: {source.dataset} row {row}")
            row += 1


def weight_path(data: datasets.Dataset | datasets.IterableDataset, source: RowsSource) -> list[str] | None:
    """The path to a source's column of weights (`find_column`), if it names one."""
    return None if source.weight_column is None else find_column(data, source.weight_column)


def weight_of(row: dict[str, Any], path: str | list[str], name: str) -> float:
    """The weight that a row has there. Raises RowError, which begins with `name`, unless it is a number from 0 on."""
    value = follow(row, path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value < math.inf):
        column = path if isinstance(path, str) else ".".join(path)
        raise RowError(f"{name}: {column}: must be a number of 0 or more, got {value!r:.80}")
    return float(value)


def used_columns(data, source: SourceConfig):
    """A data set of the columns that a source names, files undecoded: other columns would be read with each row."""
    of_files = [column for column, _ in media_of(source).file_columns(source)]
    weights = (weight_path(data, source) or [])[:1]
    used = dict.fromkeys([*of_files, *(path[0] for path, _ in text_features(data, source)), *weights])
    data = data.select_columns(list(used))
    for column in of_files:
        data = data.cast_column(column, STORED[FOLDERS[media_of(source)]](decode=False))
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


def draw_builtin(name: str, resolution: int) -> datasets.Dataset:
    """A built-in data set as PNGs in memory, with the columns `image` and `text`, or of pairs `chosen`, `rejected` and
    `text`."""
    rows, (draw, number) = [], BUILTIN_IMAGES[name]
    for index in range(number):
        *drawn, caption = draw(index, resolution)
        row: dict[str, Any] = {}
        for column, picture in zip(["image"] if len(drawn) == 1 else ["chosen", "rejected"], drawn, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", compress_level=1)
            row[column] = {"bytes": buffer.getvalue(), "path": f"{index:06d}.png"}
        rows.append(row | {"text": caption})
    features = datasets.Features(dict.fromkeys(row, datasets.Image()) | {"text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def find_metadata(source: SourceConfig) -> Path | None:
    """The `metadata.jsonl` of a folder of images, videos or sounds; None if the source is something else."""
    folder = local_path(source.dataset)
    paths = (folder / "metadata.jsonl", folder / source.split / "metadata.jsonl")
    return next((path for path in paths if path.is_file()), None)


def check_metadata(path: Path, field: str, source: SourceConfig, config: DataConfig) -> None:
    """Raise InputError for the first line that is not what such a folder needs, or (unless they are to be skipped)
    whose file is missing."""
    number = 0
    for number, line in metadata_lines(path):
        row = read_metadata_line(line, f"{path} line {number}", field, source)
        for name in files_of(row, source).values() if config.on_bad_row == "stop" else ():
            if not os.path.isfile(path.parent / name):
                raise InputError(f"{path} line {number}: no such file: {name}")
    if number == 0:
        raise InputError(f"{path}: has no line; it needs one for each {FOLDERS[media_of(source)]}")


def file_key(column: str) -> str:
    """How a line of metadata.jsonl calls the file of a column, as `datasets` reads it: `mask_file_name` is of the
    column `mask`, and `file_name` of `image`, `video` or `audio`."""
    return "file_name" if column in FOLDERS.values() else f"{column}_file_name"


def files_of(row: dict[str, Any], source: SourceConfig) -> dict[str, str]:
    """The files that a line of metadata.jsonl names, by their columns."""
    found = {column: row.get(file_key(column)) for column, _ in media_of(source).file_columns(source)}
    return {column: name for column, name in found.items() if isinstance(name, str)}


def metadata_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1 on."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def read_metadata_line(line: bytes, line_name: str, field: str, source: SourceConfig) -> dict[str, Any]:
    """A line's object, which has the names of its files (a mask's may be missing), a caption and, where the source
    names a column of them, a weight.

    Raises:
        InputError: it has not, or is no JSON; the message begins with `line_name`, or names it.
    """
    try:
        row = json.loads(line.decode().rstrip())  # so that the column is one of this line
    except json.JSONDecodeError as error:
        raise InputError(f"{line_name}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError:
        raise InputError(f"{line_name}: not UTF-8") from None
    keys = {column: file_key(column) for column, _ in media_of(source).file_columns(source)}
    files = files_of(row, source) if isinstance(row, dict) else {}
    for column, key in keys.items():
        if column not in files and column != source.mask_column:
            raise InputError(f'{line_name}: needs a "{key}", got {line.decode().strip():.80}')
    for name in files.values():
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
            raise InputError(f"{line_name}: the file must lie in this folder, got {name}")
    columns = [column for column, _ in media_of(source).text_columns(source)]
    if not any(column in row or column.split(".")[0] in row for column in columns) and source.default_caption is None:
        raise InputError(
            f"{field_of(field, 'caption_column')}: no {' or '.join(map(repr, columns))} in {line_name}; "
            f"it has {', '.join(sorted(row.keys() - {*keys.values()})) or 'only ' + ' and '.join(keys.values())}"
        )
    if source.weight_column is not None:
        weight_of(row, source.weight_column, f"{field_of(field, 'weight_column')}: {line_name}")
    return row
