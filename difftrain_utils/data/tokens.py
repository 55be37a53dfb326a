"""Texts as the tokens that samples are cut from: one text a sample, or all of a source in blocks without a gap."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.order import Order
from difftrain_utils.data.rows import MappedRows, Rows, SourceRows, map_in_threads
from difftrain_utils.errors import InputError, RowError, warn
from difftrain_utils.media.text import (
    MIDDLE,
    Tokens,
    end_token,
    read,
    size_of,
    tokenize,
    tokenizer_digest,
    vocabulary_size,
)
from difftrain_utils.processes import main_process_first
from difftrain_utils.terminal import progress

VERSION = 1  # of the tokens that are kept: raise it when a text becomes others


def load_tokens(
    accelerator: Accelerator, family, rows: Rows, validation_rows: Rows | None, config: Config
) -> tuple[Rows, Rows | None]:
    """The rows and the validation rows as the tokens of `family.tokenizer`: each by itself, or with `data.packing` pack
    in blocks, for which all texts are read.

    Raises:
        InputError: the tokenizer has no end-of-text token, or there is not one block of tokens.
        RowError: a text cannot be packed, and `data.on_bad_row` is stop.
    """
    end_token(family.tokenizer)
    as_tokens = TokenRows if config.data.packing == "pad" else Blocks
    with main_process_first(accelerator):
        rows = as_tokens(rows, family.tokenizer, config.data)
        if validation_rows is not None:
            validation_rows = as_tokens(validation_rows, family.tokenizer, config.data)
    return rows, validation_rows


class TokenRows:
    """Each row as `Tokens`; else as the `rows` are."""

    has_masks, buckets = False, None

    def __init__(self, rows: Rows, tokenizer, config: TextDataConfig):
        self.rows, self.tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tokens:
        return tokenize(self.rows[index], self.tokenizer)

    def loss_weight(self, index: Any) -> float:
        """The factor of a row's loss, without reading the row."""
        return self.rows.loss_weight(index)

    def order(self, seed: int, batch_size: int, buckets=None) -> Sequence[Any]:
        """Raises InputError: see `Rows`."""
        return self.rows.order(seed, batch_size)

    def substitutes(self, index: Any, k: int, seed: int, buckets=None) -> tuple[Iterable[Any], str]:
        """See `Rows`."""
        return self.rows.substitutes(index, k, seed)

    def inspect(self, config: TextDataConfig) -> dict[str, Any]:
        """The fingerprint of the texts, and the tokenizer's. Raises RowError: see `check`, and `Rows`."""
        found = self.rows.inspect(config) | {"tokenizer": tokenizer_digest(self.tokenizer)}
        if config.on_bad_row == "stop" and isinstance(self.rows, MappedRows):
            self.check(config)
        return found

    def check(self, config: TextDataConfig) -> None:
        """Read the tokens of every row once, so that a run does not stop midway at a prompt that is too long or at a
        text with the mask token. That it was done is remembered. Raises RowError for the first such row."""

        def read_row(index: int) -> None:
            read(self[index], MIDDLE, size_of(config), config)

        def compute() -> bytes:
            for _ in progress(map_in_threads(read_row, range(len(self))), len(self), "Reading the tokens"):
                pass
            return b""

        def identify() -> str:
            return _identity(self.rows, self.tokenizer, config, config.sequence_length)

        remembered("tokens.checked", compute, identify, config)


class Blocks(TokenRows):
    """The texts of each source one after another, each with its end-of-text token, in blocks of `data.sequence_length`
    tokens. A source's last tokens, which fill no block, are left out. All tokens lie in one file, which is mapped."""

    def __init__(self, rows: MappedRows, tokenizer, config: TextDataConfig):
        super().__init__(rows, tokenizer, config)
        self.length, self.end = config.sequence_length, end_token(tokenizer)
        self.tokens = [pack_tokens(part, tokenizer, config) for part in rows.parts]
        self.lengths = [len(tokens) // self.length for tokens in self.tokens]
        self.ends = list(itertools.accumulate(self.lengths))
        if len(self) == 0:
            names = ", ".join(part.source.dataset for part in rows.parts)
            number = f"{max(map(len, self.tokens))} tokens, fewer than the {self.length} of a sample"
            raise InputError(f"data.sequence_length: {names} has {number} (data.packing pack)")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tokens:
        part = self._part(index)
        start = (index - (self.ends[part - 1] if part else 0)) * self.length
        name = f"{self.rows.parts[part].source.dataset} tokens {start} to {start + self.length}"
        return Tokens(name, self.tokens[part][start : start + self.length], 0, self.end)

    def loss_weight(self, index: int) -> float:
        """The factor of a block's loss."""
        return self.rows.parts[self._part(index)].source.loss_weight

    def order(self, seed: int, batch_size: int, buckets=None) -> Order:
        """Raises InputError: see `Order`."""
        weights = None if None in self.rows.weights else self.rows.weights
        return Order(seed, self.lengths, weights, None, batch_size)

    def check(self, config: TextDataConfig) -> None:
        """All texts were read for the blocks."""

    def _part(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return int(np.searchsorted(self.ends, index, "right"))


def pack_tokens(part: SourceRows, tokenizer, config: TextDataConfig) -> np.ndarray:
    """The tokens of a source's texts, (n,), two or four bytes each, mapped from the disk. They are remembered: while no
    file has changed, and the tokenizer has not, no text is read.

    Texts that cannot be read are left out where `data.on_bad_row` is skip. Raises RowError otherwise.
    """
    dtype = np.dtype("<u2" if vocabulary_size(tokenizer) <= 2**16 else "<u4")

    def compute() -> bytes:
        content, bad = bytearray(), 0
        title = f"Reading the tokens of {part.source.dataset}"
        for index in progress(range(len(part)), len(part), title):
            try:
                content += np.array(tokenize(part[index], tokenizer).tokens, dtype).tobytes()
            except RowError:
                if config.on_bad_row == "stop":
                    raise
                bad += 1
        if bad:
            warn(f"data.on_bad_row: {bad} of the {len(part)} texts of {part.source.dataset} are left out")
        return bytes(content)

    def identify() -> str:
        return _identity(MappedRows([part]), tokenizer, config)

    if len(part) == 0:
        return np.zeros(0, dtype)
    content = remembered("tokens.bin", compute, identify, config, partial(np.memmap, mode="r"))
    return np.frombuffer(content, dtype)


def _identity(rows: MappedRows, tokenizer, config: TextDataConfig, *others: Any) -> str:
    """A digest that changes when the tokens of the rows do, or one of the `others`."""
    parts = VERSION, rows.identity(config), tokenizer_digest(tokenizer), *others
    return hashlib.sha256(repr(parts).encode()).hexdigest()
