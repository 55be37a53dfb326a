import hashlib
import math

import numpy as np
import pytest
import torch

from difftrain_utils import keyed_random
from difftrain_utils.keyed_random import (
    generator_for,
    keyed_rand,
    keyed_randint,
    keyed_randn,
    randn,
    seed_for,
    torch_generator_for,
)


def test_a_draw_depends_on_its_three_arguments_alone():
    first = randn(generator_for(1, "noise", 2), 5)
    torch.manual_seed(99)
    torch.randn(1000)
    assert torch.equal(first, randn(generator_for(1, "noise", 2), 5))
    for other in [(2, "noise", 2), (1, "vae_noise", 2), (1, "noise", 3)]:
        assert not torch.equal(first, randn(generator_for(*other), 5))


def test_the_stream_is_the_same_in_every_version():
    # A change of these numbers changes every run there ever was: STREAM_VERSION is raised with it.
    assert keyed_random.STREAM_VERSION == 2
    assert seed_for(0, "noise", 0) == 9144587515262914129
    assert seed_for(7, "order", 3) == 4973603909648859553
    generator = generator_for(7, "order", 3)
    assert generator.bit_generator.random_raw(2).tolist() == [780021188039952615, 2932335893356137057]
    assert generator.random(2).tolist() == [0.40861973689197306, 0.42465685993469493]
    assert generator.integers(1000, size=4).tolist() == [45, 218, 377, 446]
    assert generator.permutation(8).tolist() == [1, 7, 3, 0, 4, 5, 6, 2]
    assert keyed_rand(0, "crop", [5]).tolist() == [0.8942960476732033]
    assert keyed_rand(0, "mask", [5], (3,), np.float32).tolist() == [
        [0.5787902474403381, 0.43195098638534546, 0.10061323642730713]
    ]
    assert keyed_randint(0, "row", [5], 0, 10**12).tolist() == [709581620205]
    assert keyed_randn(0, "noise", [5], (3,)).tolist() == [
        [-0.15569372475147247, -1.6112500429153442, 0.17800234258174896]
    ]
    assert (
        hashlib.sha256(keyed_randn(0, "noise", range(64), (4, 9, 7)).numpy().tobytes()).hexdigest()[:16]
        == "b158a8875e5d682a"
    )
    assert torch_generator_for(0, "noise", 0).initial_seed() == seed_for(0, "noise", 0)


def test_the_whole_digest_is_the_key():
    digest = hashlib.blake2b(b"3/noise/8", digest_size=16).digest()
    expected = np.random.Philox(key=int.from_bytes(digest, "little"))
    assert generator_for(3, "noise", 8).bit_generator.random_raw(9).tolist() == expected.random_raw(9).tolist()


def test_rows_do_not_depend_on_the_batch_they_are_drawn_in():
    for shape in [(4, 3, 3), (5,), (), (3, 101, 131)]:  # of odd sizes, too, and more than are made at once
        together = keyed_randn(0, "noise", range(8), shape)
        first, rest = keyed_randn(0, "noise", [0, 1, 2], shape), keyed_randn(0, "noise", range(3, 8), shape)
        assert together.shape == (8, *shape)
        assert torch.equal(together, torch.cat([first, rest]))
        assert torch.equal(together[5], randn(generator_for(0, "noise", 5), *shape))
    uniform = keyed_rand(0, "mask", range(8), (5, 3), np.float32)
    assert uniform.dtype == torch.float32 and keyed_rand(0, "mask", [], (5, 3)).shape == (0, 5, 3)
    assert torch.equal(uniform, torch.cat([keyed_rand(0, "mask", [k], (5, 3), np.float32) for k in range(8)]))
    integers = keyed_randint(0, "timestep", range(8), 0, 1000)
    assert torch.equal(integers, torch.cat([keyed_randint(0, "timestep", [k], 0, 1000) for k in range(8)]))


def test_normal_numbers_are_box_and_mullers():
    words = generator_for(3, "noise", 8).bit_generator.random_raw(5).view(np.int32).astype(np.float64)
    u, v = (words[:5] + 2**31 + 0.5) / 2**32, words[5:] / 2**32
    radius = np.sqrt(-2 * np.log(u))
    expected = np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])
    assert np.array_equal(randn(generator_for(3, "noise", 8), 10).numpy(), expected.astype(np.float32))


def test_the_numbers_are_normal_and_uniform():
    n, moments = 20000, (0, 1, 0, 3, 0, 15, 0, 105)
    normal = keyed_randn(3, "noise", range(n), (2,)).double()
    for power in (1, 2, 3, 4):
        variance = moments[2 * power - 1] - moments[power - 1] ** 2
        assert abs((normal**power).mean() - moments[power - 1]) < 4 * math.sqrt(variance / (2 * n))
    # neighbouring keys are independent, and so are the numbers of a key
    assert abs((normal[1:] * normal[:-1]).mean()) < 4 / math.sqrt(2 * n)
    assert abs((normal[:, 0] * normal[:, 1]).mean()) < 4 / math.sqrt(n)
    counts = torch.bincount(keyed_randint(3, "timestep", range(n), 0, 10), minlength=10)
    expected = n / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001
    uniform = (keyed_rand(3, "crop", range(n)) * 10).long()
    assert ((torch.bincount(uniform, minlength=10) - expected) ** 2 / expected).sum() < 27.9


@pytest.mark.slow
def test_a_million_keys_of_several_purposes_do_not_collide():
    # torch's generator, of whose seed 32 bits are kept, gave some of them the same numbers
    purposes = ("noise", "timestep", "crop", "caption")
    first = [generator_for(0, purpose, k).bit_generator.random_raw() for purpose in purposes for k in range(250_000)]
    assert len(set(first)) == len(first)


def test_seeds_fit_what_takes_them():
    assert all(0 <= seed_for(0, "model", k) < 2**63 for k in range(1000))
