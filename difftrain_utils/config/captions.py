"""Captions: where they are, and how they become what a model is told; what the sections `data` of all media that have
them have."""

from dataclasses import dataclass

from difftrain_utils.config.config import Require
from difftrain_utils.config.rows import RowsConfig, RowsSource


@dataclass
class CaptionsSource(RowsSource):
    """What each item of `data.sources` has of captions."""

    caption_column: str | list[str] = "text"
    """As data.caption_column."""
    default_caption: str | None = None
    """As data.default_caption."""


@dataclass
class CaptionsConfig(RowsConfig):
    """Captions, and which of them a sample has."""

    caption_column: str | list[str] = "text"
    """Column of the captions: a string, or a list of strings of which one is drawn. `json.caption` is the field caption
    of a column json. A list of columns: of all their captions that are not null one is drawn. Integers are captions as
    text, and class labels (`datasets.ClassLabel`) by their names. A folder of photos has `text`, the files of captions
    beside them, and `file_name`, their own names."""
    default_caption: str | None = None
    """The caption of rows that have none."""
    caption_dropout: float = 0.0
    """Probability that a sample has no caption, which classifier-free guidance needs (0.1 is usual)."""
    caption_prefix: str = ""
    """What each caption begins with, literally: no space is added. A dropped caption has neither prefix nor suffix."""
    caption_suffix: str = ""
    """What each caption ends with, literally."""
    shuffle_tags: bool = False
    """Put the tags of a caption into another order for each sample, before prefix and suffix come to it. Validation
    sees captions as they are."""
    tag_dropout: float = 0.0
    """Probability that a tag is left out of a sample's caption."""
    keep_tags: int = 0
    """Number of tags, the first ones of a caption, that stay in their places."""
    tag_separator: str = ","
    """What stands between tags. Spaces around tags do not count: those that are left are put together with this and a
    space."""

    def check(self, require: Require) -> None:
        super().check(require)
        require(0 <= self.caption_dropout <= 1, "caption_dropout", "must be between 0 and 1")
        require(0 <= self.tag_dropout <= 1, "tag_dropout", "must be between 0 and 1")
        require(self.keep_tags >= 0, "keep_tags", "must be at least 0")
        require(self.tag_separator.strip() != "", "tag_separator", "must not be empty")
        rule = "cannot go with data.shuffle_tags and data.tag_dropout, which make other captions each time"
        require(not (self.cache_text and self.changes_tags), "cache_text", rule)
        for name in ("keep_tags", "tag_separator"):
            is_default = getattr(self, name) == getattr(CaptionsConfig, name)
            require(is_default or self.changes_tags, name, "goes with data.shuffle_tags or data.tag_dropout")

    @property
    def changes_tags(self) -> bool:
        """Whether samples have other tags than their captions."""
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def has_captions(self) -> bool:
        """Whether the model is told any."""
        return self.caption_dropout < 1
