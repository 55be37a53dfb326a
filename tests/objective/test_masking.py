import math
import re

import pytest
import torch

from difftrain_utils.config.config import require_of
from difftrain_utils.config.masking import MaskingConfig
from difftrain_utils.errors import InputError
from difftrain_utils.objective.masking import cut_lengths, exact_nelbo, mask_fractions, mask_tokens, masked_losses

LENGTH, MASK = 6, 4  # four tokens, and the mask
TABLE = 2 * torch.randn((MASK + 1) ** LENGTH, LENGTH, MASK + 1, generator=torch.Generator().manual_seed(0))
ESTIMATORS = [{"estimator": "count"}, {"estimator": "time"}, {"estimator": "time", "schedule": "cosine"}]


def predict(tokens: torch.Tensor) -> torch.Tensor:
    """Random logits of each masked text."""
    return TABLE[(tokens * (MASK + 1) ** torch.arange(LENGTH)).sum(1)]


def log_probs_of(tokens: torch.Tensor) -> torch.Tensor:
    return predict(tokens).double().index_fill(2, torch.tensor(MASK), -torch.inf).log_softmax(2)


def texts(n: int) -> torch.Tensor:
    return torch.randint(MASK, (n, LENGTH), generator=torch.Generator().manual_seed(1))


def losses_of(config, tokens, maskable=None, keys=None, batch_size=40, seed=0):
    keys = range(len(tokens)) if keys is None else keys
    maskable = torch.ones_like(tokens, dtype=torch.bool) if maskable is None else maskable
    fractions = mask_fractions(config, seed, keys, batch_size)
    noisy_tokens, masked = mask_tokens(config, tokens, maskable, fractions, seed, keys, MASK)
    return masked_losses(config, predict(noisy_tokens), tokens, masked, maskable, fractions, MASK)


@pytest.mark.parametrize("fields", [*ESTIMATORS, {"antithetic": True}], ids=str)
def test_both_estimators_are_of_the_exact_bound(fields):
    n, tokens = 20_000, texts(3)
    exact = exact_nelbo(log_probs_of, tokens, MASK)
    for text, expected in zip(tokens, exact, strict=True):
        estimates = LENGTH * losses_of(MaskingConfig(**fields), text.expand(n, -1)).double()
        assert abs(estimates.mean() - expected) < 4 * estimates.std() / math.sqrt(n)
        assert estimates.std() / math.sqrt(n) < 0.02 * expected


def test_the_exact_bound_of_one_token_and_of_independent_tokens_is_the_negative_log_likelihood():
    scores = torch.randn(3, MASK + 1, generator=torch.Generator().manual_seed(2)).double().log_softmax(1)
    tokens = torch.tensor([[0, 3, 1]])
    exact = exact_nelbo(lambda x: scores.expand(len(x), -1, -1), tokens, MASK)
    assert exact.item() == pytest.approx(-scores[range(3), tokens[0]].sum().item(), rel=1e-12)


@pytest.mark.parametrize("fields", [*ESTIMATORS, {"antithetic": True}], ids=str)
def test_a_samples_loss_does_not_depend_on_how_its_batch_is_split(fields):
    config, tokens = MaskingConfig(**fields), texts(40)
    maskable = torch.arange(LENGTH) >= torch.arange(40)[:, None] % 4
    together = losses_of(config, tokens, maskable, range(80, 120))
    for size in (1, 8, 20):
        parts = [slice(i, i + size) for i in range(0, 40, size)]
        split = [losses_of(config, tokens[part], maskable[part], range(80, 120)[part]) for part in parts]
        assert torch.equal(together, torch.cat(split))
    assert not torch.equal(together, losses_of(config, tokens, maskable, range(40)))
    assert not torch.equal(together, losses_of(config, tokens, maskable, range(80, 120), seed=1))


def test_the_fractions_of_a_batch_are_stratified():
    config = MaskingConfig(estimator="time", eps=1e-9)
    for batch in mask_fractions(config, 0, range(4000), 40).split(40):
        assert sorted((batch * 40).long().tolist()) == list(range(40))
    config.antithetic = True
    for batch in mask_fractions(config, 0, range(4000), 40).split(40):
        torch.testing.assert_close(batch[::2] + batch[1::2], torch.ones(20))
        assert sorted((batch[::2] * 20).long().tolist()) == list(range(20))
        assert 0 < (batch[::2] > 0.5).sum() < 20  # either of a pair may be the larger


def test_the_number_of_masked_tokens_is_uniform_and_so_are_their_places():
    config, n = MaskingConfig(), 6000
    maskable = torch.ones(n, LENGTH, dtype=torch.bool)
    fractions = mask_fractions(config, 0, range(n), 60)
    _, masked = mask_tokens(config, texts(n), maskable, fractions, 0, range(n), MASK)
    for batch in masked.sum(1).split(60):
        assert batch.bincount(minlength=LENGTH + 1).tolist() == [0] + 6 * [10]
    singles = masked[masked.sum(1) == 1].sum(0)
    assert ((singles - 1000 / 6) ** 2 / (1000 / 6)).sum() < 20.5  # chi-square with 5 degrees of freedom, p = 0.001


def test_the_time_masks_each_token_by_itself_and_the_schedule_says_how_often():
    n, maskable = 20_000, torch.ones(20_000, LENGTH, dtype=torch.bool)
    for schedule in ("linear", "cosine"):
        config = MaskingConfig("time", schedule)
        times = mask_fractions(MaskingConfig("time"), 0, range(n), 200)
        fractions = mask_fractions(config, 0, range(n), 200)
        torch.testing.assert_close(fractions, times if schedule == "linear" else (times * math.pi / 2).sin())
        _, masked = mask_tokens(config, texts(n), maskable, fractions, 0, range(n), MASK)
        shares = torch.stack([part.float().mean() for part in masked[fractions.argsort()].split(n // 10)])
        expected = torch.stack([part.mean() for part in fractions.sort().values.split(n // 10)])
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_eps_is_the_least_time_and_near_1_everything_is_masked():
    config = MaskingConfig("time", eps=0.5)
    fractions = mask_fractions(config, 0, range(40), 40)
    assert (fractions == 0.5).sum() == 20 and fractions.min() == 0.5
    config, tokens = MaskingConfig("time", eps=1 - 1e-9), texts(40)
    everything = -log_probs_of(torch.full_like(tokens, MASK)).gather(2, tokens[..., None])[..., 0].mean(1)
    torch.testing.assert_close(losses_of(config, tokens), everything.float())


@pytest.mark.parametrize("fields", ESTIMATORS, ids=str)
def test_only_masked_tokens_count_and_a_prompt_is_never_masked(fields):
    config, n = MaskingConfig(**fields), 400
    tokens, maskable, fractions = texts(n), torch.arange(LENGTH) >= torch.arange(n)[:, None] % LENGTH, None
    fractions = mask_fractions(config, 0, range(n), 200)
    noisy_tokens, masked = mask_tokens(config, tokens, maskable, fractions, 0, range(n), MASK)
    assert not (masked & ~maskable).any() and 0.3 < masked.sum() / maskable.sum() < 0.8
    if config.estimator == "count":
        assert torch.equal(masked.sum(1), (fractions * maskable.sum(1)).ceil().long())
    assert torch.equal(noisy_tokens == MASK, masked) and torch.equal(noisy_tokens[~masked], tokens[~masked])
    logits = predict(noisy_tokens).clone().requires_grad_()
    losses = masked_losses(config, logits, tokens, masked, maskable, fractions, MASK)
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert torch.equal((logits.grad != 0).any(2), masked)
    assert not logits.grad[..., MASK].any()  # whatever its logit, it is not predicted
    raised = masked_losses(
        config, logits + 9 * (torch.arange(MASK + 1) == MASK), tokens, masked, maskable, fractions, MASK
    )
    assert torch.equal(raised, losses)
    # per token of the sample's own: what follows its last maskable token changes nothing but the padding
    nothing = masked_losses(config, logits, tokens, masked & False, maskable & False, fractions, MASK)
    assert torch.equal(nothing, torch.zeros(n))


def test_a_share_of_the_samples_ends_after_a_random_number_of_tokens():
    n, length = 6000, 8
    prompt = torch.arange(length) < torch.arange(n)[:, None] % 3
    attention_mask = (torch.arange(length) < 7).expand(n, -1)  # one of padding
    maskable = attention_mask & ~prompt
    for share in (0.0, 0.5, 1.0):
        config = MaskingConfig(random_length_share=share)
        ours, seen = cut_lengths(config, maskable, attention_mask, 0, range(n))
        lengths = ours.sum(1)
        assert torch.equal(ours, seen & maskable) and torch.equal(seen & prompt, prompt) and (lengths >= 1).all()
        assert torch.equal(seen.long().cummin(1).values.bool(), seen)  # cut at the end
        is_cut = lengths < maskable.sum(1)
        for start in range(3):
            lengths_of = lengths[start::3].bincount(minlength=8)[1 : 8 - start]
            expected = share * 2000 / (7 - start)
            assert ((lengths_of[:-1] - expected).abs() <= 5 * math.sqrt(expected)).all()
        assert share > 0 or not is_cut.any()
    split = cut_lengths(config, maskable[7:9], attention_mask[7:9], 0, range(7, 9))
    assert torch.equal(split[0], ours[7:9])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"schedule": "cosine"},
            "masking.schedule: goes with masking.estimator time: count draws no time, got 'cosine'",
        ),
        ({"eps": 0.0}, "masking.eps: must be above 0 and below 1, got 0.0"),
        ({"random_length_share": 1.5}, "masking.random_length_share: must be between 0 and 1, got 1.5"),
    ],
)
def test_the_section_refuses_what_does_nothing_or_cannot_be(fields, said):
    config = MaskingConfig(**fields)
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        config.check(require_of(config, "masking"))
