"""Where rows come from and which of them are trained on, whatever they hold: what the sections `data` of all scripts
have."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require, refuse_null
from difftrain_utils.errors import InputError

MAX_WORKERS = 256  # more is a slip, and takes the machine's memory before it is noticed


@dataclass
class RowsSource:
    """What each item of `data.sources` has, besides the columns of its medium."""

    dataset: str
    """As data.dataset."""
    split: str = "train"
    """As data.split."""
    weight: float | None = None
    """Share of the samples that are of this source."""
    loss_weight: float = 1.0
    """Factor of the loss of this source's samples."""
    weight_column: str | None = None
    """As data.weight_column."""

    @classmethod
    def of_data(cls) -> list[str]:
        """The fields that data has, too."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in ("dataset", "weight", "loss_weight")]

    def check(self, field: str) -> None:
        """`field` is how errors call this source: data.sources[0], say."""
        refuse_null(self, field)
        for name in ("dataset", *self.of_data()):
            if getattr(self, name) in ("", []) and name.endswith(("dataset", "column")):
                raise InputError(f"{field}.{name}: must not be empty, got {getattr(self, name)!r}")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InputError(f"{field}.weight: must be above 0 and finite, or null, got {self.weight}")
        if not 0 <= self.loss_weight < math.inf:
            raise InputError(f"{field}.loss_weight: must be 0 or more and finite, got {self.loss_weight}")


@dataclass
class RowsConfig:
    """The rows of a data set, and which of them are trained on."""

    SOURCE: ClassVar[type[RowsSource]]
    """What the items of `sources` are."""

    dataset: str | None = None
    """A folder, or a name on the hub."""
    split: str = "train"
    """The split of the data set to train on."""
    weight_column: str | None = None
    """Column of factors of each row's loss, numbers of 0 or more (of a folder of files a field of metadata.jsonl); a
    source's `loss_weight` comes on top. null: all rows count the same."""
    streaming: bool = False
    """Read the data set as a stream, for one that does not fit on the disk (also from a folder of tar files)."""
    shuffle_buffer: int = 1000
    """Rows of a stream's lane that are shuffled among each other; as many of each lane are kept in memory."""
    lanes: int | None = None
    """Lanes of a stream, which are read side by side; each batch has as many rows of each. About the largest number of
    processes x num_workers that the run may have: fewer lanes are read by several of them, more take more memory. It
    must divide train.batch_size; null: the largest number up to 8 that does."""
    lanes_fixed: bool = False
    """A lane has the same files in each epoch, in another order: a machine finds them in its cache again. Otherwise all
    files are dealt anew."""
    stream_cache_gb: float = 10.0
    """Up to how much of what a stream reads from other machines (`hf://`, `s3://`, `https://`) is kept in `cache_dir`,
    for all processes of a machine together; 0: nothing."""
    epochs: float | None = None
    """How often the data is gone through, 2.5 times, say: `train.max_steps` in other words, which is then left out."""
    validation_split: float = 0.0
    """Share of the rows to hold out for the validation loss, chosen by their file names, or of texts by what they say:
    a row stays on its side when others come or go."""
    validation_dataset: str | None = None
    """Another data set (a folder or a hub name) for the validation loss, instead of a share of this one. It is read
    with `split` and the columns that data names, also where there are `sources`."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about a row that cannot be read: stop, or take another row in its place and count it (`skipped_rows`
    in metrics.jsonl)."""
    cache_dir: str | None = None
    """Folder of what was computed about the data, such as caches; null: `difftrain` in the cache of datasets."""
    num_workers: int = 0
    """Processes that load rows, for each training process; 0: the training process does it."""

    def check(self, require: Require) -> None:
        self.check_sources(require)
        require(0 <= self.validation_split < 1, "validation_split", "must be at least 0 and below 1")
        both = self.validation_split and self.validation_dataset
        require(not both, "validation_dataset", "cannot go with validation_split")
        require(self.epochs is None or self.epochs > 0, "epochs", "must be above 0, or null")
        require(self.shuffle_buffer >= 1, "shuffle_buffer", "must be at least 1")
        require(self.lanes is None or self.lanes >= 1, "lanes", "must be at least 1, or null")
        require(self.stream_cache_gb >= 0, "stream_cache_gb", "must be 0 or more")
        for name in ("lanes", "lanes_fixed"):
            require(not getattr(self, name) or self.streaming, name, "goes with data.streaming")
        rule = f"must be from 0 to {MAX_WORKERS} (MAX_WORKERS in difftrain_utils/config/rows.py)"
        require(0 <= self.num_workers <= MAX_WORKERS, "num_workers", rule)
        if self.streaming:
            require(not self.validation_split, "validation_split", "cannot go with streaming (validation_dataset can)")
            for source in [self, *(self.sources or [])]:
                is_builtin = source.dataset is not None and source.dataset.startswith("builtin:")
                field = "dataset" if source is self else "sources"
                require(not is_builtin, field, "streaming is for folders and the hub")

    def check_sources(self, require: Require) -> None:
        """The rules of `dataset`, `sources` and their columns."""
        require(self.dataset != "", "dataset", "must not be empty")
        require(self.cache_dir != "", "cache_dir", "must not be empty")
        require(self.dataset is None or self.sources is None, "dataset", "cannot go with data.sources")
        require(self.dataset is not None or self.sources is not None, "dataset", "needed, or else data.sources")
        require(self.sources != [], "sources", "must have at least one source")
        of_a_source = self.SOURCE.of_data()
        for name in of_a_source:
            require(not name.endswith("column") or getattr(self, name) not in ("", []), name, "must not be empty")
        weights = [source.weight for source in self.sources or []]
        for i, source in enumerate(self.sources or []):
            source.check(f"data.sources[{i}]")
            if (source.weight is None) != (weights[0] is None):
                rule = "either all sources have a weight or none has"
                raise InputError(f"data.sources[{i}].weight: {rule}, got {weights}")
        if self.sources is not None and self.validation_dataset is None:  # these would have no effect
            for name in of_a_source:
                is_default = getattr(self, name) == getattr(type(self), name)
                require(is_default, name, "goes with data.dataset; each of data.sources has its own")
