"""A tokenizer of a run's own, for a model that is trained from scratch: of bytes, of the characters of the training
data, or learned from that."""

from collections.abc import Iterable, Iterator

from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from difftrain_utils.config.config import Config
from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data.fingerprint import remembered
from difftrain_utils.data.rows import MappedRows, map_rows, split_rows
from difftrain_utils.errors import RowError
from difftrain_utils.media.text import texts_of
from difftrain_utils.processes import main_process_first
from difftrain_utils.terminal import progress

SPECIAL = {"pad_token": "[PAD]", "mask_token": "[MASK]", "eos_token": "[EOS]"}
UNKNOWN = "[UNK]"


def load_text_tokenizer(accelerator: Accelerator, config: Config) -> PreTrainedTokenizerFast | None:
    """The tokenizer that `data.tokenizer` asks for; None: the checkpoint's. All processes call it, and have the same.

    It is a function of the training texts, and kept in `data.cache_dir` while they do not change.

    Raises:
        InputError: see `map_rows`.
        RowError: a row has no text, and `data.on_bad_row` is stop.
    """
    with main_process_first(accelerator):
        return make_tokenizer(config.data)


def make_tokenizer(config: TextDataConfig) -> PreTrainedTokenizerFast | None:
    """The same, by one process."""
    if config.tokenizer is None:
        return None
    if config.tokenizer == "bytes":
        content = _of_bytes(SPECIAL.values()).to_str()
    else:
        rows, _ = split_rows(map_rows(config), config)
        learn = _of_characters if config.tokenizer == "characters" else _of_pairs
        content = remembered(
            f"tokenizer-{config.tokenizer}.json",
            lambda: learn(_texts(rows, config), config).to_str().encode(),
            lambda: rows.identity(config),
            config,
        ).decode()
    tokenizer = Tokenizer.from_str(content)
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in tokenizer.get_vocab() else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, **unknown)


def _texts(rows: MappedRows, config: TextDataConfig) -> Iterator[str]:
    for index in progress(range(len(rows)), len(rows), "Reading the texts for the tokenizer"):
        try:
            yield from texts_of(rows[index])
        except RowError:
            if config.on_bad_row == "stop":
                raise


def _of_bytes(special: Iterable[str]) -> Tokenizer:
    """A token for each byte of UTF-8, written as `ByteLevel` writes it."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(list(special))
    return _by_bytes(tokenizer)


def _by_bytes(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_pairs(texts: Iterable[str], config: TextDataConfig) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019) of at most as many tokens as asked
    for: a small text has fewer pairs."""
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = _by_bytes(Tokenizer(models.BPE()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _of_characters(texts: Iterable[str], config: TextDataConfig) -> Tokenizer:
    """A token for each character that the texts have, and one for all others."""
    names = [*SPECIAL.values(), UNKNOWN, *sorted(set().union(*texts))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, UNKNOWN))
    tokenizer.add_special_tokens([*SPECIAL.values(), UNKNOWN])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
