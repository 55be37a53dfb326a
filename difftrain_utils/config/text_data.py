"""Texts: where they are, and how they become training samples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require
from difftrain_utils.config.rows import RowsConfig, RowsSource

MAX_SEQUENCE_LENGTH, MAX_VOCABULARY = 2**17, 2**20  # more is a slip
SMALLEST_VOCABULARY = 256 + 3  # the bytes and the special tokens


@dataclass
class TextSourceConfig(RowsSource):
    """One of several data sets, an item of `data.sources`."""

    text_column: str = "text"
    """As data.text_column."""
    prompt_column: str | None = None
    """As data.prompt_column."""


@dataclass
class TextDataConfig(RowsConfig):
    """Texts, and how a text becomes a training sample."""

    SOURCE: ClassVar[type[RowsSource]] = TextSourceConfig

    dataset: str | None = None
    """A folder of texts (each `.txt` file a row), of JSONL, CSV, parquet or arrow files, one such file, a hub data set,
    or `builtin:brackets` (needs no download)."""
    text_column: str = "text"
    """Column of the texts; `a.b` is the field b of a column a."""
    prompt_column: str | None = None
    """Column of what comes before each text: it is seen, but never masked, and does not count. null: nothing."""
    sources: list[TextSourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, text_column: text, prompt_column:
    null, weight_column: null, weight: null, loss_weight: 1.0}, all but the last two as the field of data of that name.
    `weight` is a source's share of the samples (for all sources or none; they are scaled to add up to 1); without
    weights every row comes once an epoch. `loss_weight` is a factor of the loss of its samples."""
    sequence_length: int = 128
    """Tokens of a sample."""
    packing: Literal["pad", "pack"] = "pad"
    """How texts fill samples. `pad`: a sample is one text, and end-of-text tokens to its end; of a text that is longer
    another part each time, or with a prompt its beginning. `pack`: the texts of a source one after another, each with
    its end-of-text token, are cut into samples."""
    tokenizer: Literal["bytes", "characters"] | int | None = None
    """null: the checkpoint's. To train from scratch, one of its own: `bytes`, `characters` (those of the training
    data), or a number: so many tokens, learned from the training data (byte-level BPE)."""

    def check(self, require: Require) -> None:
        super().check(require)
        rule = f"must be from 2 to {MAX_SEQUENCE_LENGTH}"
        require(2 <= self.sequence_length <= MAX_SEQUENCE_LENGTH, "sequence_length", rule)
        if isinstance(self.tokenizer, int):
            rule = f"must be from {SMALLEST_VOCABULARY} (the bytes and 3 special tokens) to {MAX_VOCABULARY}"
            require(SMALLEST_VOCABULARY <= self.tokenizer <= MAX_VOCABULARY, "tokenizer", rule)
        if self.packing == "pack":
            require(not self.streaming, "packing", "data.streaming goes with pad: where blocks begin, all texts say")
            prompts = [source.prompt_column for source in [self, *(self.sources or [])]]
            require(not any(prompts), "packing", "data.prompt_column goes with pad")
            weights = [source.weight_column for source in [self, *(self.sources or [])]]
            require(not any(weights), "packing", "data.weight_column goes with pad: a block is of several texts")
        if self.streaming:
            is_learned = self.tokenizer not in (None, "bytes")
            require(not is_learned, "tokenizer", "cannot be learned from data.streaming (bytes needs no data)")

    @property
    def has_captions(self) -> bool:
        """Texts have none."""
        return False
