"""Pairs of images, of which one is preferred: each is read as an image is, both at the same place."""

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from difftrain_utils.config.pairs import PairDataConfig, PairSourceConfig
from difftrain_utils.errors import InputError, RowError, counted
from difftrain_utils.media import image
from difftrain_utils.media.captions import captions_in
from difftrain_utils.media.image import Place

RATIO = 1.02  # of two images' aspect ratios, from which on it is said that one is cropped more


# ── What is asked of a medium (media.py), where it is not as of images ───────────────────────────────────────
NOUN, HAS_CAPTIONS, MIDDLE = "pairs", image.HAS_CAPTIONS, image.MIDDLE
text_columns, limits, lasting_names = image.text_columns, image.limits, image.lasting_names
place, size_of, describe_size = image.place, image.size_of, image.describe_size
token_problems, save = image.token_problems, image.save


class Row(NamedTuple):
    """A row as it is stored: how errors call it, the undecoded `datasets.Image` that is preferred, the captions of
    both, and the other one."""

    name: str
    image: dict[str, Any] | None
    captions: Any
    rejected: dict[str, Any] | None


def file_columns(source: PairSourceConfig) -> list[tuple[str, str]]:
    return [(source.image_column, "image_column"), (source.rejected_column, "rejected_column")]


def row_of(content: dict[str, Any], name: str, source: PairSourceConfig, texts: list[tuple[list[str], Any]]) -> Row:
    """A row out of its columns; a pair whose chosen image is a file is called by its path."""
    chosen, rejected = content[source.image_column], content[source.rejected_column]
    return Row(image.path_of(chosen) or name, chosen, captions_in(content, texts, source), rejected)


def files(part) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """The paths of both images, and whether they are files that hold them."""
    return itertools.chain.from_iterable(image.paths_in(part, column) for column, _ in file_columns(part.source))


def check(row: Row, index: int, config: PairDataConfig) -> list[Any]:
    """What tells a row from others, having looked at its headers: what `image.check` says of the chosen image, and the
    file's name and the digest of the rejected one.

    Raises:
        RowError: an image that Pillow does not know or a caption that is no string, unless `data.on_bad_row` is skip.
    """
    chosen, rejected = images_of(row)
    of_chosen = image.check(chosen, index, config)
    name, _, digest = image.check(rejected, index, config)
    return [*of_chosen, name, digest]


def describe(number: int, config: PairDataConfig) -> str:
    return counted(number, NOUN)


def read(
    row: Row, place: Place, size: tuple[int, int], config: PairDataConfig, has_masks: bool = False
) -> dict[str, Any]:
    """The same place in both images, the chosen one first: "pixel_values", (2, 3, height, width) float32 in [-1, 1],
    and the "sizes" of their crops, (2, 6).

    Raises:
        RowError: an image is missing, damaged or too large.
    """
    both = [image.read(one, place, size, config) for one in images_of(row)]
    return {name: torch.stack([one[name] for one in both]) for name in both[0]}


def find_problems(row: Row, config: PairDataConfig) -> tuple[list[str], list[tuple[str, str]], None]:
    """The captions as the model is told them, and what is wrong with either image or both together."""
    chosen, rejected = images_of(row)
    captions, problems, _ = image.find_problems(chosen, config)
    problems += image.image_problems(rejected, config)
    try:
        contents = [image.read_bytes(one.image, one.name) for one in (chosen, rejected)]
        headers = [image.open_image_header(io.BytesIO(content), row.name) for content in contents]
        (height, width), (other_height, other_width) = (image.upright_size(header, row.name) for header in headers)
    except RowError:
        return captions, problems, None
    if contents[0] == contents[1]:
        problems.append(("warning", f"{row.name}: the chosen and the rejected image are the same"))
    if abs(math.log(width * other_height / (height * other_width))) > math.log(RATIO):
        sizes = f"{width} × {height} and {other_width} × {other_height} pixels"
        problems.append(("warning", f"{row.name}: two images of other shapes, {sizes}, of which one is cropped more"))
    return captions, problems, None


def refuse_equal(rows: Sequence[Row], name: str) -> None:
    """Raise InputError if in all pairs of the data set `name` both images are the same. The first pair in which they
    differ, or that cannot be read, ends the search."""
    for index in range(len(rows)):
        try:
            chosen, rejected = (image.read_bytes(one.image, one.name) for one in images_of(rows[index]))
        except RowError:
            return
        if chosen != rejected:
            return
    if len(rows):
        raise InputError(f"data: {name}: nothing to learn, all {len(rows)} pairs have the same image twice")


def images_of(row: Row) -> tuple[image.Row, image.Row]:
    """The chosen and the rejected image, each as a row of its own."""
    path = image.path_of(row.rejected)
    rejected = f"{row.name}: rejected{f' {path}' if path else ''}"
    return image.Row(row.name, row.image, row.captions), image.Row(rejected, row.rejected, row.captions)
