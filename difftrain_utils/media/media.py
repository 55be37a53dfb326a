"""What the modules of data and evaluation ask of the content of rows, of which they know nothing else: a medium is a
module with these names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from difftrain_utils.config.audio_data import AudioDataConfig, AudioSourceConfig
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.pairs import PairDataConfig, PairSourceConfig
from difftrain_utils.config.rows import RowsConfig, RowsSource
from difftrain_utils.config.text_data import TextDataConfig, TextSourceConfig
from difftrain_utils.config.video_data import VideoDataConfig, VideoSourceConfig
from difftrain_utils.media import audio, image, pairs, text, video


class Row(Protocol):
    """A row as it is stored, nothing of it decoded; with `captions` where its medium has them."""

    name: str
    """How errors call it."""


class Media(Protocol):
    """A medium. A `place` is the part of a row's content that a sample has, drawn without looking at the content."""

    NOUN: str
    """What rows are called, in the plural."""
    HAS_CAPTIONS: bool
    """Whether rows have captions, which models are told."""
    MIDDLE: Any
    """The place that caches and evaluations take."""

    def file_columns(self, source: RowsSource) -> list[tuple[str, str]]:
        """The columns of undecoded files that a source names, each with the field that does."""

    def text_columns(self, source: RowsSource) -> list[tuple[str, str]]:
        """Those of text."""

    def row_of(self, content: dict[str, Any], name: str, source: RowsSource, texts: list) -> Row:
        """A row out of its columns, those of text as `text_features` has found them; `name`, if it has no better."""

    def files(self, part) -> Iterator[tuple[list[str | None], Any]]:
        """The paths that rows name (`SourceRows`), some at a time, and whether their content lies there."""

    def limits(self, config: RowsConfig) -> tuple[Any, ...]:
        """What decides whether a row passes `check`, besides its content and `data.on_bad_row`."""

    def lasting_names(self, part) -> Iterator[list[str]]:
        """What each row is known by when others come or go, some rows at a time."""

    def check(self, row: Row, index: int, config: RowsConfig) -> list[Any]:
        """What tells a row from others, for the fingerprint. Looks at headers alone. Raises RowError for a row that
        cannot be read, unless such rows are skipped."""

    def place(self, config: RowsConfig, seed: int, k: int) -> Any:
        """Sample k's place."""

    def size_of(self, config: RowsConfig) -> tuple[int, ...]:
        """The size that samples have where not each has its own."""

    def describe(self, number: int, config: RowsConfig) -> str:
        """So many of what samples are drawn from, in words."""

    def describe_size(self, config: RowsConfig) -> str:
        """That size in words."""

    def read(self, row: Row, place: Any, size: tuple[int, ...], config: RowsConfig, has_masks: bool) -> dict[str, Any]:
        """The place in a row as tensors and facts of a sample of this size. Raises RowError if it cannot be read."""

    def find_problems(self, row: Row, config: RowsConfig) -> tuple[list[str], list[tuple[str, str]], Any]:
        """What of a row becomes tokens, ("error" or "warning", message) for all that is wrong with it, and what it is,
        where the medium has words for what all are (`describe_found`), else None."""

    def token_problems(self, name: str, texts: list[str], tokenizer, config: RowsConfig) -> Iterator[tuple[str, str]]:
        """The same for what is wrong with the tokens of these texts, of the row `name`."""

    def save(self, made: list[Any], labels: list[str], path: Path) -> None:
        """Write what a model has made with a label each, to `path` with the medium's ending. Raises RunError if it
        cannot be written."""


MEDIA: dict[type, Media] = {
    **dict.fromkeys((DataConfig, SourceConfig), image),
    **dict.fromkeys((PairDataConfig, PairSourceConfig), pairs),
    **dict.fromkeys((TextDataConfig, TextSourceConfig), text),
    **dict.fromkeys((VideoDataConfig, VideoSourceConfig), video),
    **dict.fromkeys((AudioDataConfig, AudioSourceConfig), audio),
}


def media_of(config: RowsConfig | RowsSource) -> Media:
    """The medium that a section `data` or a source is of."""
    return MEDIA[type(config)]
