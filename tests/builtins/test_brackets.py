import math

import pytest
import torch

from difftrain_utils.builtins import brackets
from difftrain_utils.builtins.brackets import MASK, is_valid, log_posterior, to_tokens, to_words, word_at, words
from difftrain_utils.config.masking import MaskingConfig
from difftrain_utils.objective.masking import exact_nelbo, mask_fractions, mask_tokens, masked_losses


def all_words(num_pairs: int) -> list[str]:
    return [word_at(i, num_pairs) for i in range(brackets.num_words(num_pairs))]


def test_the_words_are_all_there_are_and_equally_likely():
    assert [len(all_words(n)) for n in range(4)] == [1, 2, 8, 40]
    for n in (1, 2, 3, 4):
        assert len(set(all_words(n))) == brackets.num_words(n) and all(is_valid(word, n) for word in all_words(n))
    drawn = words(8000, seed=3, num_pairs=2)
    counts = torch.tensor([drawn.count(word) for word in all_words(2)])
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi-square with 7 degrees of freedom, p = 0.001
    assert words(20, seed=3, num_pairs=2) == drawn[:20] != words(20, seed=4, num_pairs=2)
    assert all(map(is_valid, words(200, seed=0))) and brackets.entropy() == pytest.approx(12.8106, abs=1e-4)


@pytest.mark.parametrize(
    "word", ["", "()", "(((((((())))))))[]", "(" * 16, "[" + ")" * 15, ")(" * 8, "([)]" * 4, "()" * 7 + "x)"]
)
def test_the_judge_refuses_what_is_no_word(word):
    assert not is_valid(word)
    assert is_valid("([])" * 4) and to_words(to_tokens(["([])" * 4])) == ["([])" * 4]


def test_the_posterior_is_the_share_of_the_words_that_fit():
    tokens = to_tokens(all_words(3))
    masked = torch.rand(len(tokens), 6, generator=torch.Generator().manual_seed(0)) < 0.6
    seen = torch.where(masked, MASK, tokens)
    fits = ((seen[:, None] == tokens) | (seen[:, None] == MASK)).all(2).double()
    shares = torch.einsum("nw,wlv->nlv", fits, torch.nn.functional.one_hot(tokens, MASK + 1).double())
    torch.testing.assert_close(log_posterior(seen).exp(), shares / fits.sum(1)[:, None, None], rtol=1e-13, atol=0)


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 4])
def test_the_exact_bound_of_the_exact_posterior_is_the_entropy_for_every_word(num_pairs):
    nelbos = exact_nelbo(log_posterior, to_tokens(all_words(num_pairs)), MASK)
    assert (nelbos - brackets.entropy(num_pairs)).abs().max() < 1e-12


@pytest.mark.parametrize("sharpness", [0.8, 1.25])
def test_a_model_that_is_not_the_posterior_has_a_higher_bound(sharpness):
    nelbos = exact_nelbo(lambda x: (sharpness * log_posterior(x)).log_softmax(2), to_tokens(all_words(3)), MASK)
    assert nelbos.mean() > brackets.entropy(3) + 0.001  # of all words, if not of each


def test_the_estimators_agree_with_the_entropy_and_counting_needs_fewer_samples():
    n, tokens, deviations = 20_000, to_tokens(words(20_000, 0, 3)), {}
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    for estimator in ("count", "time"):
        config = MaskingConfig(estimator)
        fractions = mask_fractions(config, 0, range(n), 100)
        noisy_tokens, masked = mask_tokens(config, tokens, maskable, fractions, 0, range(n), MASK)
        losses = masked_losses(config, log_posterior(noisy_tokens), tokens, masked, maskable, fractions, MASK)
        estimates = 6 * losses.double()
        deviations[estimator] = estimates.std()
        assert abs(estimates.mean() - brackets.entropy(3)) < 4 * estimates.std() / math.sqrt(n)
    assert (deviations["time"] / deviations["count"]) ** 2 > 1.5  # 1.8: 3.9 nats to 2.9
