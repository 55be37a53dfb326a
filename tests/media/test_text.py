import math

import pytest
import torch

from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.data.tokenizer import make_tokenizer
from difftrain_utils.errors import RowError
from difftrain_utils.media.text import MIDDLE, Row, Tokens, check, place, read, save, token_problems, tokenize
from difftrain_utils.objective.masking import exact_nelbo

CONFIG = TextDataConfig("memory", sequence_length=6, tokenizer="bytes")
_, MASK, END = range(3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CONFIG)


def test_a_short_text_is_filled_up_with_ends_that_are_learned(tokenizer):
    row = tokenize(Row("row 0", "abc"), tokenizer)
    sample = read(row, MIDDLE, (6,), CONFIG)
    assert sample["tokens"].tolist() == [*tokenizer("abc").input_ids, END, END, END]
    assert sample["tokens"].dtype == torch.int64 and sample["num_tokens"] == 4
    assert sample["maskable"].all() and sample["attention_mask"].all()


def test_the_bound_of_texts_of_all_lengths_is_their_entropy(tokenizer):
    """Of the exact posterior of samples: the model is not told how long a text is."""
    texts = ["a", "aa", "ab", "aba"]
    samples = [read(tokenize(Row("", text), tokenizer), MIDDLE, (4,), CONFIG) for text in texts]
    tokens = torch.stack([sample["tokens"] for sample in samples])
    assert all(sample["attention_mask"].all() and sample["maskable"].all() for sample in samples)

    def log_posterior(noisy):
        fits = ((noisy[:, None] == tokens) | (noisy[:, None] == MASK)).all(2).double()
        values = torch.nn.functional.one_hot(tokens, len(tokenizer)).double()
        return (torch.einsum("nw,wlv->nlv", fits, values) / fits.sum(1)[:, None, None]).log()

    torch.testing.assert_close(exact_nelbo(log_posterior, tokens, MASK).mean().item(), math.log(len(texts)))


def test_of_a_long_text_a_sample_has_any_window():
    row = Tokens("row 0", list(range(10, 19)), 0, END)
    starts = {round(at, 2): read(row, at, (6,), CONFIG)["tokens"].tolist() for at in (0.0, 0.24, 0.25, MIDDLE, 0.99)}
    assert starts == {at: list(range(10 + i, 16 + i)) for at, i in zip(starts, (0, 0, 1, 2, 3), strict=True)}
    places = [place(CONFIG, 0, k) for k in range(100)]
    assert places == [place(CONFIG, 0, k) for k in range(100)] != [place(CONFIG, 1, k) for k in range(100)]
    assert 0 <= min(places) < 0.1 and 0.9 < max(places) < 1


def test_a_prompt_is_seen_and_not_masked_and_comes_first(tokenizer):
    for text, num_tokens in (("xy", 3), ("long text", 4)):
        sample = read(tokenize(Row("row 0", text, "ab"), tokenizer), 0.9, (6,), CONFIG)
        assert sample["tokens"][:4].tolist() == tokenizer("ab" + text[:2]).input_ids
        assert sample["maskable"].int().tolist() == [0, 0, 1, 1, 1, 1] and sample["attention_mask"].all()
        assert sample["num_tokens"] == num_tokens
    with pytest.raises(RowError, match=r"^row 0: a prompt of 6 tokens leaves none for its text of the 6$"):
        read(tokenize(Row("row 0", "x", "prompt"), tokenizer), 0, (6,), CONFIG)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("row 3", None), "row 3: the text must be a string, got None"),
        (Row("row 3", "x", ["y"]), r"row 3: the prompt must be a string, got \['y'\]"),
        (Row("row 3", "a\ud800"), "row 3: the text is no Unicode text"),
        (Row("row 3", "a [MASK] b"), r"row 3: holds \[MASK\], which stands for a token that is masked"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(tokenizer, row, message):
    with pytest.raises(RowError, match=f"^{message}"):
        tokenize(row, tokenizer)


def test_a_bad_row_that_is_skipped_has_a_fingerprint_too():
    with pytest.raises(RowError, match="must be a string, got 3"):
        check(Row("row 0", 3), 0, CONFIG)
    assert check(Row("row 0", 3, "x"), 0, TextDataConfig("memory", on_bad_row="skip")) == [3, "x"]


def test_problems_of_tokens_are_found(tokenizer):
    def found(*texts: str, **fields) -> list:
        return list(token_problems("row 0", list(texts), tokenizer, TextDataConfig("memory", **fields)))

    assert found("abc", sequence_length=4) == []
    cut = ("warning", "row 0: 4 tokens with the end of the text, of which a sample has 3")
    assert found("abc", sequence_length=3) == [cut] and found("abc", sequence_length=3, packing="pack") == []
    assert found("abc", "prompt", sequence_length=4)[0][0] == "error"


def test_texts_are_saved_as_a_page(tmp_path):
    save(["one\ntwo", "three"], ["first", ""], tmp_path / "step-1.png")
    first, second = (tmp_path / "step-1.txt").read_text().split("\n\n")
    assert first.splitlines()[1:] == ["one", "two"] and first.startswith("── first ──")
    assert second.splitlines() == ["─" * 80, "three"]
