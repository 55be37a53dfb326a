import math

import numpy as np
import pytest
import scipy.linalg
import torch

from difftrain_utils.evaluation.distances import (
    at_infinity,
    cmmd,
    frechet_distance,
    kernel_distance,
    neighbours,
    over_halves,
)


def features_like_a_network(seed: int, count: int = 40, width: int = 6) -> torch.Tensor:
    """Correlated features away from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 3


def gaussian(seed: int, count: int, width: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


# ── The formulas ─────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("count", "tolerance"), [(40, 1e-9), (5, 1e-6)])
def test_fid_is_the_distance_of_two_gaussians(count, tolerance):
    """Against |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 √(Σ₁Σ₂)) by scipy, and with fewer images than features."""
    real, generated = (features_like_a_network(seed, count).numpy() for seed in (0, 1))
    cov1, cov2 = np.cov(real.T), np.cov(generated.T)
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(cov1) @ cov2 @ scipy.linalg.sqrtm(cov1)).real
    expected = np.square(real.mean(0) - generated.mean(0)).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(torch.tensor(real), torch.tensor(generated)) == pytest.approx(expected, rel=tolerance)
    assert expected > 1 and abs(frechet_distance(torch.tensor(real), torch.tensor(real))) < 1e-5


def test_fid_is_torchmetrics():
    metric = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    real, generated = (features_like_a_network(seed) for seed in (0, 1))
    as_they_are = torch.nn.Identity()
    as_they_are.num_features = 6
    fid = metric(as_they_are)
    fid.update(real, real=True)
    fid.update(generated, real=False)
    assert frechet_distance(real, generated) == pytest.approx(fid.compute().item(), rel=1e-5)


def unbiased(kernel, real: torch.Tensor, generated: torch.Tensor) -> float:
    """The squared MMD, pair by pair."""
    of_both = [[kernel(a, b) for a in x for b in y] for x, y in ((real, real), (generated, generated))]
    within = [
        (sum(k) - sum(k[:: len(x) + 1])) / (len(x) * (len(x) - 1))
        for k, x in zip(of_both, (real, generated), strict=True)
    ]
    return sum(within) - 2 * float(np.mean([kernel(a, b) for a in real for b in generated]))


def test_the_kernel_distances_are_the_unbiased_estimates_over_all_pairs():
    real, generated = features_like_a_network(0, 30), features_like_a_network(1, 20)
    state = torch.get_rng_state()
    got = kernel_distance(real, generated)
    assert got == pytest.approx(unbiased(lambda x, y: (float(x @ y) / 6 + 1) ** 3, real, generated), rel=1e-9)
    real, generated = (x / x.norm(dim=1, keepdim=True) for x in (real, generated))
    expected = 1000 * unbiased(lambda x, y: math.exp(-float((x - y) @ (x - y)) / 200), real, generated)
    assert cmmd(3 * real, generated) == pytest.approx(expected, rel=1e-6) and expected > 0.01
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
def test_the_kernel_distances_of_halves_of_one_set_are_0_on_average(distance):
    """Where the biased estimate (with the pairs i = i) is not."""
    parts = features_like_a_network(2, 4000).split(40)
    values = [distance(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 50**0.5 < distance(parts[0], -features_like_a_network(1))


def test_the_neighbours_are_those_counted_one_by_one():
    real, generated = gaussian(0, 30, 3), gaussian(1, 20, 3, 1.5)

    def radius(of: torch.Tensor, i: int, k: int) -> float:
        return sorted(float((of[i] - other).norm()) for j, other in enumerate(of) if j != i)[k - 1]

    def within(points: torch.Tensor, of: torch.Tensor, k: int) -> np.ndarray:
        """Whether each of the points lies within the radius of each of the others."""
        radii = [radius(of, i, k) for i in range(len(of))]
        return np.array([[float((p - of[i]).norm()) <= radii[i] for i in range(len(of))] for p in points])

    got = neighbours(real, generated)
    assert got.precision == pytest.approx(within(generated, real, 3).any(1).mean())
    assert got.recall == pytest.approx(within(real, generated, 3).any(1).mean())
    assert got.density == pytest.approx(within(generated, real, 5).sum() / 5 / 20)
    assert got.coverage == pytest.approx(within(generated, real, 5).any(0).mean())
    assert 0 < got.recall < 1 and 0 < got.coverage < 1


# ── Limit cases ──────────────────────────────────────────────────────────────────────────────────────────────
def test_neighbours_of_equal_far_collapsed_and_outlying_sets():
    real, other = gaussian(0, 400, 4), gaussian(1, 400, 4)
    same = neighbours(real, real)
    assert same.precision == same.recall == same.coverage == 1
    alike = neighbours(real, other)
    assert alike.density == pytest.approx(1, abs=0.1)  # as it should be for equal distributions
    assert alike.coverage == pytest.approx(1 - 0.5**5, abs=0.05)  # Naeem et al. 2020, equation 9, for N = M
    assert neighbours(real, other + 100) == (0, 0, 0, 0)
    collapsed = neighbours(real, 0.01 * other)  # all in the middle
    assert collapsed.precision == 1 and collapsed.recall < 0.1 and collapsed.coverage < 0.5
    aside = torch.tensor([20.0, 0, 0, 0], dtype=torch.float64)
    fooled = neighbours(torch.cat([real, aside[None]]), 0.1 * other + aside / 2)  # near the outlying one alone
    assert fooled.precision == 1 and fooled.density == pytest.approx(0.2)


def test_the_distance_at_infinity_has_less_bias_than_that_of_few():
    """Of Gaussians of 16 dimensions, 0.5 apart in each, the Fréchet distance is 16·0.25; few images make it larger."""
    found = {"few": [], "infinite": []}
    for seed in range(30):
        real, generated = gaussian(2 * seed, 100, 16), gaussian(2 * seed + 1, 100, 16, 0.5)
        few = frechet_distance(real, generated)
        found["few"].append(few)
        found["infinite"].append(at_infinity(few, over_halves(frechet_distance, real, generated)))
    bias = {name: np.mean(values) - 4 for name, values in found.items()}
    assert bias["few"] > 0.9 and abs(bias["infinite"]) < 0.2 * bias["few"], bias


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, cmmd, lambda a, b: neighbours(a, b).coverage])
def test_halves_vary_as_much_as_other_sets_would(distance):
    sets = [(gaussian(2 * seed, 80, 5), gaussian(2 * seed + 1, 80, 5, 0.5)) for seed in range(60)]
    true = np.std([distance(*of) for of in sets], ddof=1)
    estimated = [np.std(over_halves(distance, *of), ddof=1) for of in sets[:15]]
    assert 0.75 < np.mean(estimated) / true < 1.35, np.mean(estimated) / true
