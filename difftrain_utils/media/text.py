"""Texts as tokens: a text, or a window of it, at the one length that a run trains at."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from difftrain_utils.config.text_data import TextDataConfig, TextSourceConfig
from difftrain_utils.errors import InputError, RowError, counted
from difftrain_utils.files import text_digest, write_file
from difftrain_utils.keyed_random import generator_for
from difftrain_utils.media.captions import follow

# ── What is asked of a medium (media.py) ─────────────────────────────────────────────────────────────────────
NOUN, HAS_CAPTIONS = "texts", False
MIDDLE = 0.5


class Row(NamedTuple):
    """A row as it is stored: how errors call it, its text, and the prompt before it where its source has them."""

    name: str
    text: Any
    prompt: Any = None


def file_columns(source: TextSourceConfig) -> list[tuple[str, str]]:
    return []


def text_columns(source: TextSourceConfig) -> list[tuple[str, str]]:
    columns = [(source.text_column, "text_column"), (source.prompt_column, "prompt_column")]
    return [(column, field) for column, field in columns if column]


def row_of(content: dict[str, Any], name: str, source: TextSourceConfig, texts: list[tuple[list[str], Any]]) -> Row:
    """A row out of its columns."""
    return Row(name, *(follow(content, path) for path, _ in texts))


def files(part) -> Iterator[tuple[list[str | None], np.ndarray]]:
    """None: texts lie in the rows."""
    return iter(())


def limits(config: TextDataConfig) -> tuple[Any, ...]:
    return ()


def lasting_names(part) -> Iterator[list[str]]:
    """The texts themselves, so that none is on both sides of a split."""
    columns = [_values(part, path) for path, _ in part.texts]
    for values in zip(*columns, strict=True):
        yield [json.dumps(of_row) for of_row in zip(*values, strict=True)]


def check(row: Row, index: int, config: TextDataConfig) -> list[Any]:
    """The text and its prompt, as they are. Raises RowError if one is no text, unless `data.on_bad_row` is skip."""
    if config.on_bad_row == "stop":
        texts_of(row)
    return list(row[1:])


def place(config: TextDataConfig, seed: int, k: int) -> float:
    """How far into its text sample k's window lies, in [0, 1)."""
    return generator_for(seed, "window", k).random()


def size_of(config: TextDataConfig) -> tuple[int]:
    """(length,) of what is trained on."""
    return (config.sequence_length,)


def describe(number: int, config: TextDataConfig) -> str:
    return f"{counted(number, 'blocks')} of {NOUN}" if config.packing == "pack" else counted(number, NOUN)


def describe_size(config: TextDataConfig) -> str:
    return f"{config.sequence_length} tokens"


class Tokens(NamedTuple):
    """A row's tokens, of which the first `num_prompt` are its prompt's, and the token that ends texts."""

    name: str
    tokens: Sequence[int]
    num_prompt: int
    end: int


def read(
    row: Tokens, place: float, size: tuple[int], config: TextDataConfig, has_masks: bool = False
) -> dict[str, torch.Tensor]:
    """The place in a row as a sample of `size` (length,): "tokens", int64, "maskable", bool, all but the prompt's,
    "attention_mask", bool, which are all true, and "num_tokens", how many are the text's own.

    What a text leaves of the length is filled with more tokens that end it, which are learned as others are (LLaDA, Nie
    et al. 2025, arXiv:2502.09992, does so in fine-tuning): a model that saw where it ends would not learn how long
    texts are, and its bound would not be that of texts. A text without a prompt that is longer is cut to a window; of
    one with a prompt the beginning is kept.

    Raises:
        RowError: the prompt leaves no room for the text.
    """
    (length,) = size
    if row.num_prompt >= length:
        raise RowError(f"{row.name}: a prompt of {row.num_prompt} tokens leaves none for its text of the {length}")
    start = 0 if row.num_prompt else int(place * (max(len(row.tokens) - length, 0) + 1))
    window = torch.as_tensor(np.asarray(row.tokens[start : start + length], dtype=np.int64))
    tokens = torch.full((length,), row.end)
    tokens[: len(window)] = window
    return {
        "tokens": tokens,
        "maskable": torch.arange(length) >= row.num_prompt,
        "attention_mask": torch.ones(length, dtype=torch.bool),
        "num_tokens": torch.tensor(len(window) - row.num_prompt),
    }


def find_problems(row: Row, config: TextDataConfig) -> tuple[list[str], list[tuple[str, str]], None]:
    """The text and its prompt, and ("error" or "warning", message) for what is wrong with them."""
    try:
        texts = texts_of(row)
    except RowError as error:
        return [], [("error", str(error))], None
    return texts, [] if texts[0].strip() else [("warning", f"{row.name}: an empty text")], None


def token_problems(name: str, texts: list[str], tokenizer, config: TextDataConfig) -> Iterator[tuple[str, str]]:
    """The same of what a tokenizer makes of them."""
    try:
        row = tokenize(Row(name, *texts), tokenizer)
        read(row, MIDDLE, size_of(config), config)
    except RowError as error:
        yield "error", str(error)
        return
    length, number = config.sequence_length, len(row.tokens)
    if number > length and config.packing == "pad":
        yield "warning", f"{name}: {number} tokens with the end of the text, of which a sample has {length}"
    unknown = 0 if tokenizer.unk_token_id is None else list(row.tokens).count(tokenizer.unk_token_id)
    if unknown:
        yield "warning", f"{name}: {unknown} of {number} tokens stand for what the tokenizer does not know"


def save(made: list[str], labels: list[str], path: Path) -> None:
    """Write texts as one text file, `path` with that ending. Raises RunError if it cannot."""
    write_file(path.with_suffix(".txt"), page(made, labels))


def page(made: list[str], labels: list[str]) -> str:
    """Texts, each below its label."""
    heads = [f"── {label} ".ljust(80, "─") if label else "─" * 80 for label in labels]
    return "\n".join(f"{head}\n{text}\n" for head, text in zip(heads, made, strict=True))


# ── Texts and their tokens ───────────────────────────────────────────────────────────────────────────────────
def texts_of(row: Row) -> list[str]:
    """A row's text and, where it has one, its prompt. Raises RowError if one is no string, or no Unicode text."""
    texts = [row.text] if row.prompt is None else [row.text, row.prompt]
    for what, text in zip(("text", "prompt"), texts, strict=False):
        if not isinstance(text, str):
            raise RowError(f"{row.name}: the {what} must be a string, got {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair, which JSON can say
            raise RowError(f"{row.name}: the {what} is no Unicode text, got {text!r:.80}") from None
    return texts


def tokenize(row: Row, tokenizer) -> Tokens:
    """A row's prompt, text and end-of-text token. Raises RowError for what `texts_of` refuses, and for the token that
    stands for a masked one, which cannot be learned."""
    text, *prompts = (encode(each, row.name, tokenizer) for each in texts_of(row))
    prompt = prompts[0] if prompts else []
    return Tokens(row.name, [*prompt, *text, end_token(tokenizer)], len(prompt), end_token(tokenizer))


def encode(text: str, name: str, tokenizer) -> list[int]:
    """A text's tokens, without those that a tokenizer puts around it. Raises RowError: see `tokenize`."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in tokens:
        raise RowError(f"{name}: holds {tokenizer.mask_token}, which stands for a token that is masked")
    return tokens


def end_token(tokenizer) -> int:
    """The token that ends a text, or of an encoder that separates two. Raises InputError if there is none."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return token
    raise InputError(
        "model.pretrained_model_name_or_path: its tokenizer has no end-of-text token (eos_token, sep_token)"
    )


def vocabulary_size(tokenizer) -> int:
    """One more than a tokenizer's largest token: there may be gaps below it."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 of all that a tokenizer does, but for cutting and padding, which a call asks for."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return text_digest(backend.to_str() + json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))


def _values(part, path: list[str]) -> Iterator[list[Any]]:
    """A column's values, some rows at a time."""
    for values, rows in part.batches(path[0]):
        yield [follow({path[0]: value}, path) for value in values.take(rows).to_pylist()]
