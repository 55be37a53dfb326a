import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from difftrain_utils.builtins.brackets import MASK, entropy, log_posterior, to_tokens, words
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.evaluation.nelbo import by_mask_fraction, validation_fractions, validation_nelbos

NUM_PAIRS = 3
TOKENS = to_tokens(words(500, 0, NUM_PAIRS))
EXACT = SimpleNamespace(mask_token_id=MASK, predict=lambda denoiser, tokens, attention_mask: log_posterior(tokens))


def read_batch(keys) -> dict[str, torch.Tensor]:
    tokens = TOKENS[[key % len(TOKENS) for key in keys]]
    ones = torch.ones_like(tokens)
    return {"tokens": tokens, "maskable": ones.bool(), "attention_mask": ones.bool(), "num_tokens": ones.sum(1)}


def nelbos(n=4000, accelerator=None, family=EXACT, read=read_batch, **fields):
    evaluation = EvaluationConfig(**{"num_validation_samples": n, "num_validation_bins": 8, "batch_size": 500} | fields)
    return validation_nelbos(accelerator or Accelerator(), family, torch.nn.Identity(), read, evaluation)


def test_the_exact_posterior_has_the_entropy_within_the_standard_error():
    nats, num_tokens = nelbos()
    assert set(num_tokens.tolist()) == {2 * NUM_PAIRS}
    metrics = by_mask_fraction("loss", nats, num_tokens, 8)
    # of the mean of each bin, as the bins all have their share
    error = 2 * NUM_PAIRS * math.sqrt(nats.view(-1, 8).var(0).mean() / len(nats))
    assert abs(metrics["loss_text"] - entropy(NUM_PAIRS)) < 3 * error < 0.1
    assert metrics["loss"] == pytest.approx(metrics["loss_text"] / 6)
    assert metrics["loss_bits"] == pytest.approx(metrics["loss"] / math.log(2))
    assert metrics["loss_perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert sum(metrics["loss_bins"]) / 8 == pytest.approx(metrics["loss"])
    assert metrics["loss_bins"] == sorted(metrics["loss_bins"])  # the more is masked, the less is known


def test_it_is_a_function_of_the_model_and_the_evaluation_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    nats, _ = nelbos(64)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(nats, nelbos(64, batch_size=8)[0])
    assert torch.equal(nats[:56], nelbos(56)[0])  # and not of how many there are
    assert not torch.equal(nats, nelbos(64, seed=1)[0])


def test_the_processes_share_the_triples_out():
    parts = []
    for index in range(3):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), num_processes=3, process_index=index, reduce=lambda found, how: found
        )
        parts.append(torch.stack(nelbos(64, accelerator)))
    assert all((part[1] > 0).sum() in (21, 22) for part in parts)
    assert torch.equal(sum(parts), torch.stack(nelbos(64)))


def test_a_bin_is_a_share_of_masked_tokens():
    evaluation = EvaluationConfig(num_validation_bins=4)
    fractions = validation_fractions(evaluation, range(4000)).view(-1, 4)
    assert ((fractions * 4).ceil() == torch.arange(1, 5)).all()
    assert fractions.mean(0).tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.01)


def test_longer_texts_count_for_more():
    def read(keys):
        return read_batch(keys) | {"num_tokens": torch.tensor([2 if key % 2 else 6 for key in keys])}

    uniform = SimpleNamespace(mask_token_id=MASK, predict=lambda _, tokens, mask: torch.zeros(*tokens.shape, MASK + 1))
    nats, num_tokens = nelbos(64, family=uniform, read=read)
    of_text = 6 * math.log(4)  # of four brackets, never of the mask
    torch.testing.assert_close(nats, torch.tensor([of_text / 6, of_text / 2] * 32))
    assert num_tokens.tolist() == [6, 2] * 32
    metrics = by_mask_fraction("loss", torch.tensor([1.0, 3.0]), torch.tensor([6.0, 2.0]), 1)
    assert metrics["loss"] == 1.5 and metrics["loss_text"] == 6


def test_a_model_that_diverges_has_a_perplexity():
    metrics = by_mask_fraction("loss", torch.tensor([1000.0]), torch.tensor([6.0]), 1)
    assert metrics["loss"] == 1000 and metrics["loss_perplexity"] == math.inf
