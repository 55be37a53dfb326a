"""Find all that is wrong with the images and captions of a config, before training does.

    difftrain check-data --config configs/sd15_finetune.yaml --data.dataset path/to/images

Takes the options of train_text_to_image.py. Decodes every image of data.dataset (or of all data.sources) and of
data.validation_dataset, and prints a line for each problem, with file and line:

    error:    training stops at it, or with data.on_bad_row skip takes another row in its field; also an image that
              metadata.jsonl names twice, which training would see twice as often
    warning:  training takes it: an empty caption, one that is cut off, an image that is enlarged

Of the checkpoint it loads a tokenizer alone, that which takes the longest captions. Exit code 2 if there is an error,
else 0.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.rows import MappedRows, Row, SourceRows, follow, join_captions, map_in_threads, read_bytes
from difftrain_utils.data.sources import (
    caption_columns,
    find_metadata,
    metadata_lines,
    open_source,
    read_metadata_line,
    sources_of,
    validation_source,
)
from difftrain_utils.errors import InputError, RowError
from difftrain_utils.families.load import load_tokenizer
from difftrain_utils.media.image import open_image
from difftrain_utils.media.text import captions_of

Problem = tuple[str, str]  # "error" or "warning", and the message


def main(argv: list[str] | None = None) -> None:
    config = parse_config(TextToImageConfig, argv, prog="difftrain check-data")
    tokenizer = load_tokenizer(config)
    num_rows, kinds = 0, []
    sources = sources_of(config.data) + ([validation_source(config.data)] if config.data.validation_dataset else [])
    for field, source in sources:
        length, row_at, problems = list_rows(field, source, config.data)
        num_rows += length
        title = source.dataset
        for kind, message in (*problems, *check_rows(length, row_at, title, config.data, tokenizer)):
            kinds.append(kind)
            tqdm.write(f"{kind}: {message}")
    found = [f"{n} {kind}{'s' * (n > 1)}" for kind in ("error", "warning") if (n := kinds.count(kind))]
    print(f"{num_rows} images and their captions: {' and '.join(found) or 'all fine'}")
    if "error" in kinds:
        sys.exit(2)


def list_rows(field: str, source: SourceConfig, config: DataConfig) -> tuple[int, Callable[[int], Row], list[Problem]]:
    """The number of rows, a function that reads row i, and what is wrong with metadata.jsonl or the data set itself.

    A row's name is how problems call it.
    """
    path, problems = find_metadata(source), []
    if path is None and config.streaming:
        raise InputError(
            "data.streaming: check_data reads a data set as a whole, and an image folder without loading it"
        )
    if path is None:
        try:
            rows = MappedRows([SourceRows(open_source(field, source, config), source)])
        except InputError as error:
            return 0, [].__getitem__, [("error", str(error))]

        def row_at(index: int) -> Row:
            row = rows[index]
            return row._replace(name=f"{source.dataset} row {index}: {row.name}".removesuffix(f": row {index}"))

        return len(rows), row_at, []

    rows, lines = [], {}
    for number, line in metadata_lines(path):
        try:
            row = read_metadata_line(line, f"{path} line {number}", field, source)
        except InputError as error:
            problems.append(("error", str(error)))
            continue
        file, name = os.path.normpath(path.parent / row["file_name"]), f"{path} line {number}: {row['file_name']}"
        if file in lines:
            several = "several captions of an image go into a list"
            problems.append(("error", f"{name}: the same file as in line {lines[file]}; {several}"))
        lines.setdefault(file, number)
        captions = join_captions([follow(row, column) for column in caption_columns(source)])
        rows.append(Row(name, {"bytes": None, "path": file}, captions))
    if not problems:
        try:  # what only `datasets` objects to, such as captions of unlike types
            open_source(field, source, dataclasses.replace(config, on_bad_row="skip"))
        except InputError as error:
            problems.append(("error", str(error)))
    return len(rows), rows.__getitem__, problems


def check_rows(
    length: int, row_at: Callable[[int], Row], title: str, config: DataConfig, tokenizer
) -> Iterator[Problem]:
    """Decode every image and count the tokens of every caption; the problems come in the order of the rows."""
    limit = None if tokenizer is None else tokenizer.model_max_length
    checked = map_in_threads(lambda index: check_row(row_at(index), config), range(length))
    for name, captions, problems in tqdm(checked, total=length, desc=title, unit=" images"):
        yield from problems
        for caption in captions if tokenizer is not None else ():
            num_tokens = len(tokenizer(caption, verbose=False).input_ids)
            if num_tokens > limit:
                yield "warning", f"{name}: a caption of {num_tokens} tokens, which is cut off after {limit}"


def check_row(row: Row, config: DataConfig) -> tuple[str, list[str], list[Problem]]:
    """The row's name, its captions and what is wrong with it."""
    name, value, caption = row
    captions, problems = [], []
    try:
        width, height = open_image(read_bytes(value, name), name).size
        if min(width, height) < config.resolution:
            problems.append(("warning", f"{name}: {width} × {height} pixels, to be enlarged to {config.resolution}"))
    except RowError as error:
        problems.append(("error", str(error)))
    try:
        captions = captions_of(caption, name)
        if not all(map(str.strip, captions)):
            problems.append(("warning", f"{name}: an empty caption"))
    except RowError as error:
        problems.append(("error", str(error)))
    return name, captions, problems
