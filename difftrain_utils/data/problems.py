"""What is wrong with the data, all of it instead of the first thing."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets

from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.rows import RowsConfig
from difftrain_utils.data.photos import find_problems
from difftrain_utils.data.rows import map_in_threads, open_rows
from difftrain_utils.data.sources import (
    FOLDERS,
    WITH_CAPTIONS_BESIDE,
    file_key,
    files_of,
    find_metadata,
    metadata_lines,
    open_source,
    photo_folder,
    read_metadata_line,
)
from difftrain_utils.errors import InputError
from difftrain_utils.media import audio, image, text, video
from difftrain_utils.media.captions import follow, join_captions, label_text
from difftrain_utils.media.media import Row, media_of
from difftrain_utils.terminal import progress

Problem = tuple[str, str]  # "error" or "warning", and the message


def list_rows(field: str, source: SourceConfig, config: DataConfig) -> tuple[int, Callable[[int], Row], list[Problem]]:
    """The number of rows, a function that reads row i, and what is wrong with metadata.jsonl or the data set itself.

    A row's name is how problems call it. A photo without a caption is a row that has none.
    """
    media, problems = media_of(source), []
    path = find_metadata(source) if media is not text else None
    if path is None and config.streaming:
        raise InputError(
            "data.streaming: check_data reads a data set as a whole, and one with a metadata.jsonl without loading it"
        )
    if path is None:
        try:
            if media in WITH_CAPTIONS_BESIDE and (photos := photo_folder(field, source)) is not None:
                problems = list(find_problems(photos, FOLDERS[media]))
                config = dataclasses.replace(config, on_bad_row="skip")
            rows = open_rows([(field, source)], config)
        except InputError as error:
            errors = [problem for problem in problems if problem[0] == "error"]
            return 0, [].__getitem__, problems + ([] if errors else [("error", str(error))])

        def row_at(index: int) -> Row:
            row, number = rows[index], f"{source.dataset} row {index}"
            return row if row.name == number else row._replace(name=f"{number}: {row.name}")

        return len(rows), row_at, problems

    rows, values, lines = [], [], {}
    for number, line in metadata_lines(path):
        try:
            row = read_metadata_line(line, f"{path} line {number}", field, source)
        except InputError as error:
            problems.append(("error", str(error)))
            continue
        files = {column: os.path.normpath(path.parent / file) for column, file in files_of(row, source).items()}
        name = f"{path} line {number}: {row[file_key(media.file_columns(source)[0][0])]}"
        images = tuple(file for column, file in files.items() if column != source.mask_column)
        if images in lines:
            of_one = {image: "an image", video: "a video", audio: "a sound"}.get(media, "a pair")
            several = f"several captions of {of_one} go into a list"
            same = "file" if len(images) == 1 else "files"
            problems.append(("error", f"{name}: the same {same} as in line {lines[images]}; {several}"))
        lines.setdefault(images, number)
        values.append([follow(row, column) for column, _ in media.text_columns(source)])
        columns = dict.fromkeys((column for column, _ in media.file_columns(source)))
        content = columns | {column: {"bytes": None, "path": file} for column, file in files.items()}
        rows.append(media.row_of(content, name, source, [])._replace(name=name))
    features = [integers_of(column) for column in zip(*values, strict=True)]
    for i, of_row in enumerate(values):
        captions = join_captions([label_text(*pair) for pair in zip(of_row, features, strict=True)], source)
        rows[i] = rows[i]._replace(captions=captions)
    if not problems:
        try:  # what only `datasets` objects to, such as captions of unlike types
            open_source(field, source, dataclasses.replace(config, on_bad_row="skip"))
        except InputError as error:
            problems.append(("error", str(error)))
    return len(rows), rows.__getitem__, problems


def integers_of(values: Sequence[Any]) -> datasets.Value | None:
    """What `datasets` makes of a column of these values if they are integers, or null."""
    are_integers = all(value is None or type(value) is int for value in values)
    return datasets.Value("int64") if are_integers else None


def check_rows(
    length: int, row_at: Callable[[int], Row], title: str, config: RowsConfig, tokenizer, found: list[Any]
) -> Iterator[Problem]:
    """Decode every row and count the tokens of its texts; the problems come in the order of the rows. Puts what its
    medium says of each row that can be read into `found`."""
    media = media_of(config)

    def check_row(index: int) -> tuple[str, list[str], list[Problem], Any]:
        row = row_at(index)
        return row.name, *media.find_problems(row, config)

    checked = map_in_threads(check_row, range(length))
    for name, texts, problems, of_row in progress(checked, length, f"Decoding the {media.NOUN} of {title}"):
        yield from problems
        found += [] if of_row is None else [of_row]
        if tokenizer is not None and texts:
            yield from media.token_problems(name, texts, tokenizer, config)
