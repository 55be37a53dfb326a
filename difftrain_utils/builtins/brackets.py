"""The built-in data set of text: words of nested brackets of several kinds, all equally likely, such as ([]())[].

It is a language with an exact answer to every question: the entropy, below which no model's likelihood bound can be,
the distribution of each masked bracket given those that are seen, and whether a word is one.
"""

import math
from functools import cache

import torch

from difftrain_utils.keyed_random import generator_for

NUM_PAIRS = 8
OPENING, CLOSING = "([", ")]"
BRACKETS = OPENING + CLOSING
"""A bracket's token here is its place among them."""
MASK = len(BRACKETS)
"""The token of a bracket that is not seen."""


def words(num_rows: int, seed: int, num_pairs: int = NUM_PAIRS) -> list[str]:
    """The rows of the data set: words of `num_pairs` pairs; word i depends on (seed, i) alone."""
    total = num_words(num_pairs)
    return [word_at(int(generator_for(seed, "brackets", i).integers(total)), num_pairs) for i in range(num_rows)]


def num_words(num_pairs: int = NUM_PAIRS) -> int:
    """How many words there are: Catalan's number of shapes, times the kinds of their pairs."""
    return math.comb(2 * num_pairs, num_pairs) // (num_pairs + 1) * len(OPENING) ** num_pairs


def entropy(num_pairs: int = NUM_PAIRS) -> float:
    """The entropy of a word in nats: 12.81 of 8 pairs of 2 kinds."""
    return math.log(num_words(num_pairs))


def word_at(index: int, num_pairs: int = NUM_PAIRS) -> str:
    """The word with this number in [0, num_words(num_pairs))."""
    shape, kinds = divmod(index, len(OPENING) ** num_pairs)
    word, open_kinds = "", []
    for num_left in reversed(range(2 * num_pairs)):
        num_opening = _num_endings(len(open_kinds) + 1, num_left)  # how many shapes go on with an opening bracket
        if shape < num_opening:
            kinds, kind = divmod(kinds, len(OPENING))
            open_kinds.append(kind)
            word += OPENING[kind]
        else:
            shape -= num_opening
            word += CLOSING[open_kinds.pop()]
    return word


@cache
def _num_endings(num_open: int, num_left: int) -> int:
    """How many ways there are to close `num_open` brackets with the last `num_left`, whatever their kinds."""
    if not 0 <= num_open <= num_left:
        return 0
    return 1 if num_left == 0 else _num_endings(num_open + 1, num_left - 1) + _num_endings(num_open - 1, num_left - 1)


def is_valid(word: str, num_pairs: int = NUM_PAIRS) -> bool:
    """The judge: whether it is a word of the data set, of its length."""
    open_kinds = []
    for bracket in word:
        if bracket in OPENING:
            open_kinds.append(OPENING.index(bracket))
        elif bracket not in CLOSING or not open_kinds or open_kinds.pop() != CLOSING.index(bracket):
            return False
    return not open_kinds and len(word) == 2 * num_pairs


def to_tokens(words: list[str]) -> torch.Tensor:
    """The tokens of words of one length, (len(words), length), int64."""
    return torch.tensor([[BRACKETS.index(bracket) for bracket in word] for word in words])


def to_words(tokens: torch.Tensor) -> list[str]:
    """The words of tokens (batch, length), none of them `MASK`."""
    return ["".join(BRACKETS[token] for token in row) for row in tokens.tolist()]


def log_posterior(tokens: torch.Tensor) -> torch.Tensor:
    """What the best of all models says of tokens (batch, length), some of them `MASK`: the log-probabilities (batch,
    length, MASK + 1), float64, of what stands in each place, all words that fit the seen ones being equally likely.

    The number of words Z is a polynomial in weights w of the brackets in each place, 1 for those that may be there and
    0 for others, so that w·∂Z/∂w / Z are their shares of the words. Z is summed over stretches: one of n places is a
    pair of brackets with a stretch in it, and one after it. Where no word fits, the result is NaN.
    """
    length, num_kinds = tokens.shape[1], len(OPENING)
    allowed = torch.nn.functional.one_hot(tokens, MASK + 1).double()[..., :MASK]
    allowed = torch.where((tokens == MASK)[..., None], 1.0, allowed)
    with torch.enable_grad():
        weights = allowed.requires_grad_()
        pairs = torch.einsum("bik,bjk->bij", weights[..., :num_kinds], weights[..., num_kinds:])
        stretches = {0: torch.ones(len(tokens), length + 1, dtype=torch.float64, device=tokens.device)}  # by start
        for size in range(2, length + 1, 2):
            stretches[size] = sum(
                pairs.diagonal(inside + 1, 1, 2)[:, : length - size + 1]
                * stretches[inside][:, 1 : length - size + 2]
                * stretches[size - 2 - inside][:, inside + 2 : length - size + inside + 3]
                for inside in range(0, size - 1, 2)
            )
        total = stretches[length][:, 0]
        (slopes,) = torch.autograd.grad(total.sum(), weights)
    shares = weights.detach() * slopes / total.detach()[:, None, None]
    return torch.nn.functional.pad(shares, (0, 1)).log()
