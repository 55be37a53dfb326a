import itertools

import pytest
import torch

from difftrain_utils.builtins.brackets import MASK, log_posterior, num_words, to_tokens, to_words, word_at
from difftrain_utils.families.text_samplers import _draw, sample_tokens

NUM_PAIRS, LENGTH = 2, 4
WORDS = [word_at(i, NUM_PAIRS) for i in range(num_words(NUM_PAIRS))]


@pytest.fixture(scope="module")
def posterior():
    """The exact model of the words, as a table; nothing is said of tokens that no word fits."""
    tokens = torch.tensor(list(itertools.product(range(MASK + 1), repeat=LENGTH)))
    table = log_posterior(tokens).float()
    table[table.isnan()] = 0
    places = (MASK + 1) ** torch.arange(LENGTH - 1, -1, -1)
    return lambda tokens: table[(tokens * places).sum(1)]


def generators(keys) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(key) for key in keys]


def sample(predict, n=400, start=None, keys=None, **fields) -> list[str]:
    start = torch.full((n, LENGTH), MASK) if start is None else start
    fields = {"sampler": "confidence", "num_inference_steps": LENGTH} | fields
    return to_words(sample_tokens(predict, start, MASK, generators(range(n) if keys is None else keys), **fields))


def test_ancestral_with_many_steps_draws_all_words_equally_often(posterior):
    found = sample(posterior, 2000, sampler="ancestral", num_inference_steps=200)
    counts = torch.tensor([found.count(word) for word in WORDS])
    assert counts.sum() >= 0.975 * 2000  # of 3 % of the words two brackets are drawn in one step, apart
    expected = counts.sum() / len(WORDS)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square with 7 degrees of freedom, p = 0.001
    few = sample(posterior, 400, sampler="ancestral", num_inference_steps=2)
    assert sum(word in WORDS for word in few) < 0.9 * 400


@pytest.mark.parametrize("fields", [{}, {"block_length": 2}, {"block_length": 1}, {"num_inference_steps": 7}], ids=str)
def test_confidence_with_a_step_a_token_draws_nothing_but_words(posterior, fields):
    assert set(sample(posterior, **fields)) == set(WORDS)


def test_a_temperature_of_0_takes_the_likeliest_token_and_a_low_one_nearly_always(posterior):
    assert len(set(sample(posterior, temperature=0))) == 1
    start = torch.tensor([[MASK, MASK, MASK, MASK]]).expand(400, -1)
    scores = torch.tensor([0.6, 0.3, 0.06, 0.04, 0.0]).log().expand(400, LENGTH, -1)
    for temperature, share in ((1.0, 0.6), (0.5, 0.36 / (0.36 + 0.09 + 0.0036 + 0.0016)), (0.01, 1.0)):
        found = "".join(sample(lambda tokens: scores, start=start, temperature=temperature, sampler="ancestral"))
        assert found.count("(") / len(found) == pytest.approx(share, abs=0.04)


def test_what_cannot_be_is_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(1, 4, -1)
    draws = torch.tensor([[0.0, 0.4999, 0.5, 1 - 2**-24]])
    assert _draw(logits, draws, 1.0).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
def test_prompts_stay_and_what_follows_fits(posterior, sampler):
    start = to_tokens(["(((("]).expand(600, -1).clone()
    start[:, 1:] = MASK
    start[200:400, 1] = 1  # "(["
    start[400:, 2] = 3  # "(.]"
    found = sample(posterior, 600, start=start, sampler=sampler, num_inference_steps=200, block_length=2)
    assert set(found[200:400]) == {"([])"}
    assert set(found[400:]) == {"([])"} if sampler == "confidence" else found[400:].count("([])") > 190
    assert {word[0] for word in found} == {"("} and len(set(found[:200]) & set(WORDS)) == 4


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
def test_a_sample_depends_on_its_generator_alone(posterior, sampler):
    fields = {"sampler": sampler, "num_inference_steps": 6, "block_length": 3}
    together = sample(posterior, 40, **fields)
    assert together[7:9] == sample(posterior, 2, keys=[7, 8], **fields)
    start = torch.full((3, LENGTH), MASK)
    start[1, :3], start[2] = 0, 0  # neighbours with other blocks, or nothing to fill in
    assert sample(posterior, 3, start=start, **fields)[0] == together[0]


def test_the_blocks_are_filled_from_left_to_right_and_each_step_fills_as_many(posterior):
    seen = []

    def predict(tokens):
        seen.append(tokens == MASK)
        return posterior(tokens)

    for sampler, steps in (("confidence", 2), ("confidence", 8), ("ancestral", 8)):
        seen.clear()
        sample(predict, sampler=sampler, num_inference_steps=steps, block_length=2)
        assert len(seen) == steps
        assert not seen[steps // 2][:, :2].any() and seen[steps // 2][:, 2:].all()
        if sampler == "confidence":
            left = [masks.sum(1).unique().tolist() for masks in seen]
            assert left == {2: [[4], [2]], 8: [[4], [3], [2], [2], [2], [1], [0], [0]]}[steps]


def test_it_refuses_what_it_cannot_do(posterior):
    with pytest.raises(ValueError, match="3 steps are too few for 4 blocks"):
        sample(posterior, num_inference_steps=3, block_length=1)
    with pytest.raises(ValueError, match="ancestral, confidence, got 'greedy'"):
        sample(posterior, sampler="greedy")
