from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch

from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.config.text_to_video import VideoNoiseConfig
from difftrain_utils.keyed_random import keyed_randn
from difftrain_utils.objective.noise import (
    _variance_of_enlarged,
    correlate_frames,
    pair,
    perturb_input,
    sample_noise,
    unit_noise,
)

SHAPES = [(8, 4, 17), (8, 4, 16, 16), (8, 4, 3, 8, 8)]


def draw(shape=(8, 4, 16, 16), keys=None, seed=0, conditions=None, group_size=None, **fields) -> torch.Tensor:
    keys, latents = keys or list(range(shape[0])), keyed_randn(9, "latents", range(shape[0]), shape[1:])
    config = VideoNoiseConfig if "frame_correlation" in fields else NoiseConfig
    return sample_noise(config(**fields), seed, keys, latents, conditions or [None] * len(keys), group_size)


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


@pytest.mark.parametrize("shape", [(8, 4, 17), (8, 4, 3, 4, 4)])
def test_the_offset_of_a_sound_or_a_clip_is_one_for_all_of_it(shape):
    shift = draw(shape, offset=0.5) - draw(shape)
    of_channels = shift.flatten(2)[..., :1]
    torch.testing.assert_close(shift.flatten(2), of_channels.expand(-1, -1, shift[0, 0].numel()), rtol=0, atol=1e-6)
    assert of_channels.unique().numel() > 24


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


def test_a_stills_pyramid_noise_is_an_images_and_a_clips_is_slow_where_it_is_coarse():
    image, still = (draw(shape, pyramid_discount=0.8) for shape in ((8, 4, 16, 16), (8, 4, 1, 16, 16)))
    torch.testing.assert_close(still[:, :, 0], image, rtol=1e-5, atol=1e-5)
    many = draw((2000, 1, 3, 6, 10), pyramid_discount=0.9)
    assert (many.square().mean(0) - 1).abs().max() < 6 * (2 / 2000) ** 0.5
    of_means, of_places = torch.corrcoef(many.mean((3, 4))[:, 0].T), torch.corrcoef(many[:, 0, :, 2, 2].T)
    assert of_means.min() > 0.5 and of_means[0, 2] > 1.5 * of_places[0, 2]  # its frames have what is coarse in common


def test_a_signals_pyramid_noise_is_slow_where_it_is_coarse():
    """That of sounds' latents, (channels, length)."""
    many = draw((2000, 8, 24), pyramid_discount=0.9).flatten(0, 1)
    covariance = many.T @ many / len(many)
    assert (covariance.diagonal() - 1).abs().max() < 6 * (2 / len(many)) ** 0.5  # at each place
    near, farther, far = (covariance.diagonal(apart).mean() for apart in (1, 4, 23))
    assert near > 1.3 * farther > 1.5 * far > 0.05
    two = draw((2000, 8, 2), pyramid_discount=0.5).flatten(0, 1)  # 2 parts of full size, and discount² of the mean
    assert (two[:, 0] * two[:, 1]).mean() == pytest.approx(0.25 / (2 + 0.25), abs=0.02)


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["mixed", "progressive"])
def test_frames_have_noise_in_common_as_pyoco_has_it(kind, strength):
    """Of unit variance at each place, correlated as far as the formula says, and by a computation of our own."""
    config, count = VideoNoiseConfig(frame_correlation=kind, frame_correlation_strength=strength), 4000
    noise = draw((count, 1, 4, 1, 2), frame_correlation=kind, frame_correlation_strength=strength)
    shared, frames = strength**2 / (1 + strength**2), torch.arange(4)
    apart = (frames[:, None] - frames).abs()
    expected = torch.where(apart == 0, 1.0, shared) if kind == "mixed" else shared ** (apart / 2)
    for place in range(2):
        covariance = noise[:, 0, :, 0, place].T @ noise[:, 0, :, 0, place] / count
        torch.testing.assert_close(covariance, expected, rtol=0, atol=5 * (2 / count) ** 0.5)
    between_places = noise[:, 0, :, 0, 0].T @ noise[:, 0, :, 0, 1] / count
    assert between_places.abs().max() < 5 / count**0.5

    drawn = keyed_randn(0, "noise", range(2), (4, 6, 3, 5)).double()
    common, own = drawn[:, :, 0], drawn[:, :, 1:]
    if kind == "mixed":  # the shares of the variance, as in the paper
        made = [shared**0.5 * common + (1 / (1 + strength**2)) ** 0.5 * own[:, :, i] for i in range(5)]
    else:
        rho = strength / (1 + strength**2) ** 0.5
        made = [
            rho ** (i + 1) * common + sum((1 - rho**2) ** 0.5 * rho ** (i - j) * own[:, :, j] for j in range(i + 1))
            for i in range(5)
        ]
    ours = draw((2, 4, 5, 3, 5), frame_correlation=kind, frame_correlation_strength=strength)
    torch.testing.assert_close(ours.double(), torch.stack(made, 2), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, correlate_frames(config, drawn.float()))
    assert torch.equal(unit_noise(config, 0, "noise", [1], (4, 5, 3, 5)), ours[1:])  # whatever is beside it


def test_the_nearest_of_correlated_noise():
    fields = {"frame_correlation": "mixed", "pairing": "knn", "knn_candidates": 3}
    shape = (5, 4, 3, 2, 2)
    assert torch.equal(draw((2, *shape[1:]), **fields), draw(shape, **fields)[:2])
    assert not torch.equal(draw(shape, **fields), draw(shape, frame_correlation="mixed"))


def test_input_perturbation_adds_independent_noise():
    noise = draw((500, 4, 8, 8))
    perturbed = perturb_input(NoiseConfig(input_perturbation=0.1), 0, range(500), noise)
    extra = (perturbed - noise) / 0.1
    assert abs(extra.std() - 1) < 0.02 and abs((extra * noise).mean()) < 0.02
    assert perturb_input(NoiseConfig(), 0, range(500), noise) is noise


def test_input_perturbation_is_noise_of_the_same_kind():
    config = VideoNoiseConfig(frame_correlation="mixed", input_perturbation=0.1)
    noise = torch.zeros(500, 4, 3, 4, 4)
    first, second, _ = (perturb_input(config, 0, range(500), noise) / 0.1).unbind(2)
    assert abs(first.std() - 1) < 0.02 and (first * second).mean() == pytest.approx(0.5, abs=0.02)


def cheapest(latents: torch.Tensor, noise: torch.Tensor, cost: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The rows of `noise` in the order whose sum of costs is least, `cost` of differences, of all orders."""
    of_pairs = cost((latents[:, None] - noise[None]).flatten(2).norm(dim=2))
    orders = permutations(range(len(latents)))
    return noise[list(min(orders, key=lambda order: sum(of_pairs[i, j] for i, j in enumerate(order))))]


def of_two_conditions(count: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Latents around -1 and 1, noise, and which of the two each has."""
    latents, noise = (keyed_randn(seed, "noise", range(count), shape) for seed in (9, 0))
    signs = torch.tensor([-1.0, 1.0, 1.0])[torch.arange(count) % 3]
    return latents + signs.reshape(-1, *[1] * len(shape)), noise, ["abb"[i % 3] for i in range(count)]


def test_the_nearest_noise_is_the_cheapest_of_all_orders():
    latents, noise, _ = of_two_conditions(6, 4, 3, 3)
    assert torch.equal(pair(latents, noise), cheapest(latents, noise, lambda distance: distance))


def test_transport_is_the_cheapest_of_all_orders_of_each_condition():
    """With a cost that forbids all others, as in C2OT."""
    latents, noise, conditions = of_two_conditions(7, 1, 2, 1)
    forbidden = torch.tensor([[a != b for b in conditions] for a in conditions]) * 1e6
    paired = pair(latents, noise, conditions)
    assert torch.equal(paired, cheapest(latents, noise, lambda distance: distance.square() + forbidden))
    assert not torch.equal(paired, cheapest(latents, noise, lambda distance: distance + forbidden))
    assert not torch.equal(paired, noise)


def test_transport_leaves_each_conditions_noise_gaussian_and_the_nearest_does_not():
    latents, noise, conditions = of_two_conditions(1200, 1, 1, 2)
    of_a = torch.tensor([condition == "a" for condition in conditions])
    skewed = pair(latents, noise, group_size=12)[of_a].mean()
    paired = pair(latents, noise, conditions, group_size=12)
    assert skewed < -0.5 and abs(paired[of_a].mean()) < 4 / 800**0.5 and abs(paired[of_a].var() - 1) < 0.2
    drawn = draw((1200, 1, 1, 2), conditions=conditions, group_size=12, pairing="transport")
    assert torch.equal(drawn[of_a].flatten(1).sum(1).sort().values, noise[of_a].flatten(1).sum(1).sort().values)


@pytest.mark.parametrize("pairing", ["nearest", "transport"])
def test_groups_are_paired_on_their_own(pairing):
    conditions, fields = list("aabbabab"), {"pairing": pairing}
    whole = draw((8, 4, 4, 4), conditions=conditions, **fields)
    grouped = draw((8, 4, 4, 4), conditions=conditions, group_size=4, **fields)
    latents, plain = keyed_randn(9, "latents", range(8), (4, 4, 4)), draw((8, 4, 4, 4))
    told = conditions if pairing == "transport" else [None] * 8
    halves = [pair(latents[half], plain[half], told[half]) for half in (slice(4), slice(4, 8))]
    if pairing == "nearest":
        halves = [pair(latents[half], plain[half]) for half in (slice(4), slice(4, 8))]
    assert torch.equal(grouped, torch.cat(halves)) and not torch.equal(grouped, whole)


def test_knn_noise_is_the_nearest_of_those_drawn_for_a_sample():
    shape, keys = (5, 4, 3, 3), range(5)
    latents = keyed_randn(9, "latents", keys, shape[1:])
    candidates = [keyed_randn(0, purpose, keys, shape[1:]) for purpose in ("noise", "noise_1", "noise_2")]
    distances = torch.stack([(latents - noise).flatten(1).norm(dim=1) for noise in candidates])
    expected = torch.stack(candidates)[distances.argmin(0), torch.arange(5)]
    drawn = draw(shape, pairing="knn", knn_candidates=3)
    assert torch.equal(drawn, expected) and len(set(distances.argmin(0).tolist())) > 1
    assert torch.equal(draw((2, 4, 3, 3), pairing="knn", knn_candidates=3), expected[:2])  # whatever is beside it
    with_more = draw(shape, pairing="knn", knn_candidates=3, offset=0.1, pyramid_discount=0.5)
    assert not torch.equal(with_more, drawn)


def test_knn_noise_is_as_weak_as_the_docs_say():
    """.895 of the variance for the nearest of 64 in 256 dimensions, here as numpy draws and chooses it, too."""
    rng = np.random.default_rng(0)
    of_numpy = []
    for latents in rng.standard_normal((400, 256), np.float32):
        candidates = rng.standard_normal((64, 256), np.float32)
        of_numpy.append(np.square(candidates[np.linalg.norm(candidates - latents, axis=1).argmin()]).mean())
    ours = draw((400, 4, 8, 8), pairing="knn", knn_candidates=64).square().mean()
    assert np.mean(of_numpy) == pytest.approx(0.895, abs=0.01) and ours == pytest.approx(0.895, abs=0.01)
