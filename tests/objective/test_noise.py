import pytest
import torch

from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.keyed_random import keyed_randn
from difftrain_utils.objective.noise import _variance_of_enlarged, assign, perturb_input, sample_noise

SHAPES = [(8, 4, 17), (8, 4, 16, 16), (8, 4, 3, 8, 8)]


def draw(shape=(8, 4, 16, 16), keys=None, seed=0, group_size=None, **fields) -> torch.Tensor:
    latents = keyed_randn(9, "latents", range(shape[0]), shape[1:])
    return sample_noise(NoiseConfig(**fields), seed, keys or list(range(shape[0])), latents, group_size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "fields", [{}, {"offset": 0.1}, {"pyramid_discount": 0.8}, {"offset": 0.1, "pyramid_discount": 0.5}]
)
def test_every_rank_and_every_key_on_its_own(shape, fields):
    noise = draw(shape, **fields)
    assert noise.shape == shape and noise.dtype == torch.float32
    halves = [draw((4, *shape[1:]), keys=list(range(i, i + 4)), **fields) for i in (0, 4)]
    assert torch.equal(noise, torch.cat(halves))


def test_plain_noise_is_the_streams_own():
    assert torch.equal(draw(), keyed_randn(0, "noise", range(8), (4, 16, 16)))


def test_offset_shifts_each_channel_by_a_normal_number():
    shape = (2000, 4, 4, 4)
    shift = draw(shape, offset=0.5) - draw(shape)
    torch.testing.assert_close(shift, shift[..., :1, :1].expand(shape), rtol=0, atol=1e-6)
    assert abs(shift[..., 0, 0].std() - 0.5) < 0.02
    assert abs((shift[:, 0, 0, 0] * shift[:, 1, 0, 0]).mean()) < 0.03  # the channels are independent


def test_pyramid_noise_has_unit_variance_and_more_of_the_low_frequencies():
    many = draw((4000, 1, 6, 10), pyramid_discount=0.9)
    assert (many.square().mean(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5  # at each place, in the middle as at an edge
    shape = (50, 4, 32, 32)
    pyramid, plain = draw(shape, pyramid_discount=0.8), draw(shape)
    low = [torch.nn.functional.avg_pool2d(noise, 8).var() for noise in (pyramid, plain)]
    assert low[0] > 5 * low[1]


def test_the_variance_of_enlarged_noise_is_what_it_comes_to():
    coarse = torch.randn(20_000, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    enlarged = torch.nn.functional.interpolate(coarse, (6, 10), mode="bilinear")
    expected = _variance_of_enlarged((2, 3), (6, 10))
    torch.testing.assert_close(enlarged.var(0)[0], expected, rtol=0.06, atol=0)
    assert expected.max() == 1 and expected.min() < 0.3  # a coarse place itself, and the middle of four


def test_pyramid_levels_weigh_as_in_the_original():
    """Of a field that has one coarser level only, of one place: 2 parts of full size, and discount² of the mean."""
    noise = draw((5_000, 1, 2, 2), pyramid_discount=0.5)
    mean = noise.mean((1, 2, 3)).var()  # 2 / 4 of the full size, and 0.25 of the level
    assert mean == pytest.approx((2 / 4 + 0.25) / (2 + 0.25), rel=0.05)


def test_input_perturbation_adds_independent_noise():
    noise = draw((500, 4, 8, 8))
    perturbed = perturb_input(NoiseConfig(input_perturbation=0.1), 0, range(500), noise)
    extra = (perturbed - noise) / 0.1
    assert abs(extra.std() - 1) < 0.02 and abs((extra * noise).mean()) < 0.02
    assert perturb_input(NoiseConfig(), 0, range(500), noise) is noise


def test_immiscible_noise_is_the_nearest_assignment():
    latents = keyed_randn(9, "latents", range(6), (4, 3, 3))
    noise = keyed_randn(0, "noise", range(6), (4, 3, 3))
    assigned = assign(latents, noise)
    rows = {tuple(row.flatten().tolist()) for row in noise}
    assert {tuple(row.flatten().tolist()) for row in assigned} == rows  # a permutation

    def cost(order):
        return (latents - noise[list(order)]).flatten(1).norm(dim=1).sum()

    from itertools import permutations

    best = min(cost(order) for order in permutations(range(6)))
    torch.testing.assert_close((latents - assigned).flatten(1).norm(dim=1).sum(), best)


def test_immiscible_groups_are_assigned_on_their_own():
    whole = draw((8, 4, 4, 4), immiscible=True)
    grouped = draw((8, 4, 4, 4), immiscible=True, group_size=4)
    latents, plain = keyed_randn(9, "latents", range(8), (4, 4, 4)), draw((8, 4, 4, 4))
    expected = torch.cat([assign(latents[:4], plain[:4]), assign(latents[4:], plain[4:])])
    assert torch.equal(grouped, expected) and not torch.equal(grouped, whole)
