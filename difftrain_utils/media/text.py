"""Captions."""

from typing import Any

import datasets

from difftrain_utils.errors import RowError


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
