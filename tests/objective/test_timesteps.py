import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from difftrain_utils.config.objective import TimestepsConfig
from difftrain_utils.objective.schedule import Schedule
from difftrain_utils.objective.timesteps import quantile, sample_timesteps

DDPM, FLOW = (Schedule.of(s) for s in (DDPMScheduler(beta_schedule="scaled_linear"), FlowMatchEulerDiscreteScheduler()))
COSINE = Schedule("cosine", "v_prediction")
UNIFORM = ((torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000).tolist()


def quantiles(**fields) -> torch.Tensor:
    return torch.tensor([quantile(TimestepsConfig(**fields), DDPM, u) for u in UNIFORM], dtype=torch.float64)


def draw(schedule, n=4000, batch_size=40, seed=0, shift=1.0, purpose="timestep", **fields) -> torch.Tensor:
    return sample_timesteps(TimestepsConfig(**fields), schedule, seed, range(n), batch_size, shift, purpose=purpose)


@pytest.mark.parametrize("schedule", [DDPM, FLOW])
def test_uniform_covers_the_schedule(schedule):
    timesteps = draw(schedule)
    assert timesteps.is_floating_point() == (schedule is FLOW)
    assert timesteps.min() >= 0 and timesteps.max() <= (1000 if schedule is FLOW else 999)
    counts = torch.histc(timesteps.float(), 10, 0, 1000)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("fields", [{}, {"stratified": True}, {"density": "logit_normal", "stratified": True}])
def test_a_timestep_depends_on_its_key_and_not_on_the_batch_it_is_drawn_in(fields):
    config = TimestepsConfig(**fields)
    together = sample_timesteps(config, FLOW, 3, range(64), 16)
    split = torch.cat([sample_timesteps(config, FLOW, 3, range(i, i + 4), 16) for i in range(0, 64, 4)])
    assert torch.equal(together, split)
    assert not torch.equal(together, sample_timesteps(config, FLOW, 4, range(64), 16))


def test_stratified_batches_have_one_timestep_in_each_part():
    timesteps = draw(DDPM, batch_size=40, stratified=True)
    for batch in timesteps.split(40):
        assert sorted((batch // 25).tolist()) == list(range(40))
    means, independent = (t.float().reshape(-1, 40).mean(1).std() for t in (timesteps, draw(DDPM)))
    assert means < independent / 10
    assert len({tuple((batch // 25).tolist()) for batch in timesteps.split(40)}) == 100  # another order each time


@pytest.mark.parametrize(
    ("scheme", "fields", "kwargs"),
    [
        ("logit_normal", {"logit_mean": 0.3, "logit_std": 0.8}, {"logit_mean": 0.3, "logit_std": 0.8}),
        ("mode", {"mode_scale": 1.29}, {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.5}, {"mode_scale": -0.5}),
        ("none", {"density": "uniform"}, {}),
    ],
)
def test_densities_are_those_of_diffusers(scheme, fields, kwargs):
    reference = compute_density_for_timestep_sampling(
        scheme, 200_000, generator=torch.Generator().manual_seed(0), **kwargs
    )
    ours = quantiles(**({"density": scheme} | fields))
    levels = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    torch.testing.assert_close(ours.quantile(levels), reference.double().quantile(levels), rtol=0, atol=5e-3)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cosmap", "table"])
def test_quantiles_rise_from_zero_to_one(density):
    fractions = quantiles(density=density, table=[1.0, 0.0, 3.0] if density == "table" else None)
    assert (fractions.diff() >= 0).all() and 0 <= fractions[0] < 0.02 and 0.98 < fractions[-1] <= 1


def test_cosmap_has_its_density():
    # π(t) = 2 / (π - 2πt + 2πt²) (Esser et al. 2024)
    counts = torch.histc(quantiles(density="cosmap"), 20, 0, 1) / len(UNIFORM) * 20
    t = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    expected = 2 / (torch.pi - 2 * torch.pi * t + 2 * torch.pi * t**2)
    torch.testing.assert_close(counts, expected, rtol=0.01, atol=0)


def test_a_table_gives_its_parts_their_weights():
    timesteps = draw(DDPM, n=8000, density="table", table=[1, 0, 2, 1])
    shares = torch.histc(timesteps.float(), 4, 0, 1000) / 8000
    torch.testing.assert_close(shares, torch.tensor([0.25, 0, 0.5, 0.25]), rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", [DDPM, FLOW, COSINE])
def test_log_normal_has_its_mean_and_deviation_in_log_sigma(schedule):
    timesteps = draw(schedule, density="log_normal", p_mean=-0.4, p_std=0.8)
    log_sigmas = -0.5 * schedule.snr(timesteps).log()
    assert abs(log_sigmas.mean() + 0.4) < 0.05 and abs(log_sigmas.std() - 0.8) < 0.05


def test_edm2s_density_is_that_of_the_noise_of_data_of_its_own_deviation():
    """ln σ of mean -0.4 and deviation 1 (Karras et al. 2024, arXiv:2312.02696) where data have 0.5: σ = 0.5·tan φ."""
    timesteps = draw(COSINE, density="log_normal", p_mean=-0.4 - math.log(0.5), p_std=1.0)
    log_sigmas = (0.5 * torch.tan(timesteps.double() * torch.pi / 2000)).log()
    assert abs(log_sigmas.mean() + 0.4) < 0.05 and abs(log_sigmas.std() - 1) < 0.05


def test_a_range_keeps_the_timesteps_in_it():
    timesteps = draw(DDPM, min=0.2, max=0.5)
    assert timesteps.min() >= 200 and timesteps.max() < 500 and timesteps.float().std() > 80


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_the_shift_moves_flow_towards_noise(shift):
    schedule = Schedule.of(FlowMatchEulerDiscreteScheduler(shift=shift))
    plain, moved = draw(FLOW) / 1000, draw(schedule, shift=schedule.shift) / 1000
    torch.testing.assert_close(moved, shift * plain / (1 + (shift - 1) * plain), rtol=1e-5, atol=1e-6)


def test_the_shift_moves_nothing_else():
    """Neither integer timesteps nor densities that say themselves how much noise there is."""
    assert torch.equal(draw(DDPM, shift=3.0), draw(DDPM))
    assert torch.equal(draw(COSINE, shift=3.0), draw(COSINE))
    for fields in ({"density": "log_normal", "p_mean": -0.5}, {"density": "table", "table": [1.0, 2.0]}):
        assert torch.equal(draw(FLOW, shift=3.0, **fields), draw(FLOW, **fields))


@pytest.mark.parametrize("fields", [{}, {"stratified": True}])
def test_another_purpose_draws_other_numbers_and_leaves_the_first_ones_as_they_were(fields):
    config = TimestepsConfig(**fields)
    first = sample_timesteps(config, FLOW, 0, range(4000), 40)
    second, third = (draw(FLOW, purpose=purpose, **fields) for purpose in ("second_timestep", "third_timestep"))
    assert torch.equal(sample_timesteps(config, FLOW, 0, range(4000), 40), first)
    assert torch.equal(draw(FLOW, purpose="timestep", **fields), first)
    correlations = torch.corrcoef(torch.stack([first, second, third])) - torch.eye(3)
    assert correlations.abs().max() < 0.05
    assert not any((a == b).any() for a, b in ((first, second), (first, third), (second, third)))
