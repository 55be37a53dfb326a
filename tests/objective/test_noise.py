import pytest
import torch

from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.keyed_random import keyed_randn
from difftrain_utils.objective.noise import assign, perturb_input, sample_noise

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
    shape = (50, 4, 32, 32)
    pyramid, plain = draw(shape, pyramid_discount=0.8), draw(shape)
    torch.testing.assert_close(pyramid.flatten(1).std(1), torch.ones(50))
    low = [torch.nn.functional.avg_pool2d(noise, 8).var() for noise in (pyramid, plain)]
    assert low[0] > 5 * low[1]


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
