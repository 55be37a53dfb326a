"""Captions."""

from typing import Any

import datasets

from difftrain_utils.config.captions import CaptionsConfig, CaptionsSource
from difftrain_utils.errors import RowError
from difftrain_utils.keyed_random import generator_for


def label_text(value: Any, feature: Any) -> Any:
    """The caption that a label of a data set's column stands for: the name of a `datasets.ClassLabel`, None of one that
    is missing (-1), or an integer as text. What other columns have is a caption already."""
    if type(value) is int and isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None
    is_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    return str(value) if type(value) is int and is_integer else value


def captions_of(value: Any, name: str) -> list[str]:
    """A row's captions: one string, or a list of at least one. Raises RowError if `value` is neither, or no
    Unicode text."""
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise RowError(f"{name}: the caption must be a string or a list of strings, got {value!r:.80}")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can say
        raise RowError(f"{name}: the caption is no Unicode text, got {value!r:.80}") from None
    return captions


def find_caption_problems(value: Any, name: str, config: CaptionsConfig) -> tuple[list[str], list[tuple[str, str]]]:
    """A row's captions as the model is told them, and ("error" or "warning", message) for what is wrong with them."""
    try:
        captions = captions_of(value, name)
    except RowError as error:
        return [], [("error", str(error))]
    problems = [] if all(map(str.strip, captions)) else [("warning", f"{name}: an empty caption")]
    return [complete(caption, config) for caption in captions], problems


def draw_tags(caption: str, config: CaptionsConfig, seed: int, k: int) -> str:
    """Sample k's caption of a caption of tags: those after the first `data.keep_tags` shuffled (`data.shuffle_tags`),
    and each left out with the probability `data.tag_dropout`. Empty tags are left out."""
    if not config.changes_tags:
        return caption
    separator = config.tag_separator.strip()
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    kept, others = tags[: config.keep_tags], tags[config.keep_tags :]
    is_kept = generator_for(seed, "tag_dropout", k).random(len(others)) >= config.tag_dropout
    order = range(len(others))
    if config.shuffle_tags:
        order = generator_for(seed, "tag_order", k).permutation(len(others))
    return f"{separator} ".join(kept + [others[i] for i in order if is_kept[i]])


def complete(caption: str, config: CaptionsConfig) -> str:
    """A caption between `data.caption_prefix` and `data.caption_suffix`, as the model is told it."""
    return config.caption_prefix + caption + config.caption_suffix


def follow(row: dict[str, Any], path: str | list[str]) -> Any:
    """What a row has at the path to a column (`find_column`, or a dotted name); None where it has nothing."""
    if isinstance(path, str):
        path = [path] if path in row else path.split(".")
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def captions_in(row: dict[str, Any], columns: list[tuple[list[str], Any]], source: CaptionsSource) -> Any:
    """A row's captions, in the columns of `text_features`."""
    return join_captions([label_text(follow(row, path), feature) for path, feature in columns], source)


def join_captions(values: list[Any], source: CaptionsSource) -> Any:
    """A row's captions out of those of its caption columns: of several all that are not null, in one list; the default
    caption if there are none."""
    captions = [v for value in values if value is not None for v in (value if isinstance(value, list) else [value])]
    if len(values) == 1:
        captions = values[0]
    return source.default_caption if captions in (None, []) and source.default_caption is not None else captions
