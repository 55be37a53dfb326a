"""Captions."""

from typing import Any

from difftrain_utils.errors import RowError


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
