"""Pairs of images: where they are, and how a pair becomes a training sample."""

from dataclasses import dataclass
from typing import ClassVar

from difftrain_utils.config.config import Require
from difftrain_utils.config.data import DataConfig, SourceConfig
from difftrain_utils.config.rows import RowsSource
from difftrain_utils.errors import InputError

OTHER = "must be another column than image_column, that of the images that are preferred"


@dataclass
class PairSourceConfig(SourceConfig):
    """One of several data sets of pairs, an item of `data.sources`."""

    image_column: str = "chosen"
    """As data.image_column."""
    rejected_column: str = "rejected"
    """As data.rejected_column."""

    def check(self, field: str) -> None:
        super().check(field)
        if self.rejected_column == self.image_column:
            raise InputError(f"{field}.rejected_column: {OTHER}, got {self.rejected_column!r}")


@dataclass
class PairDataConfig(DataConfig):
    """Pairs of images with a caption, of which one is preferred, and how a pair becomes a training sample."""

    SOURCE: ClassVar[type[RowsSource]] = PairSourceConfig

    dataset: str | None = None
    """A folder of images with a `metadata.jsonl` (`chosen_file_name`, `rejected_file_name`, `text`), of parquet, arrow
    or WebDataset tar files, a hub data set, or `builtin:shape-pairs` (needs no download)."""
    image_column: str = "chosen"
    """Column of the images that are preferred."""
    rejected_column: str = "rejected"
    """Column of the images that they are preferred to."""
    mask_column: str | None = None
    """Of single images: not for pairs."""
    sources: list[PairSourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, image_column: chosen,
    rejected_column: rejected, caption_column: text, default_caption: null, weight: null, loss_weight: 1.0}, the first
    six as the field of data of that name. `weight` is a source's share of the samples (for all sources or none; they
    are scaled to add up to 1); without weights every pair comes once an epoch. `loss_weight` is a factor of the loss of
    its samples."""

    def check(self, require: Require) -> None:
        super().check(require)
        require(self.rejected_column != self.image_column, "rejected_column", OTHER)
        masks = [self.mask_column, *(source.mask_column for source in self.sources or [])]
        require(not any(masks), "mask_column", "is of single images: pairs have no masks")
