"""Random numbers that are a function of (seed, purpose, key), never of what was drawn before.

Sample k of a run is drawn from the key k, so a resumed run, another number of processes or another
gradient accumulation sees the same sample. Numbers are drawn on the CPU and moved, so every device sees
the same ones.

The bits are those of Philox4x64-10, a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), whose whole 128-bit key is a digest of the three arguments. NumPy promises
that these bits never change. Uniform numbers, integers and permutations are made of them by arithmetic on
integers; normal numbers by Box and Muller's transform in float64, rounded to float32.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

from difftrain_utils.devices import to_device

# Which numbers a run draws: to be raised when any of them changes. 1 was torch's generator, which keeps 32 bits of its
# seed, with the captions of a batch encoded together.
STREAM_VERSION = 2
ROOM = 2**16  # numbers made at once, so that they stay in the processor's cache


def generator_for(seed: int, purpose: str, key: int) -> np.random.Generator:
    """A generator that depends on nothing but its three arguments.

    `purpose` names what is drawn ("noise", "timestep", …): two purposes never share numbers, so
    adding a new draw to a fork leaves the old ones as they were.
    """
    return np.random.Generator(np.random.Philox(_Key(_digest(seed, purpose, key, 16))))


def torch_generator_for(seed: int, purpose: str, key: int) -> torch.Generator:
    """As `generator_for`, for what takes a generator of torch, such as a pipeline: on the CPU it keeps 32 bits."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, key))


def seed_for(seed: int, purpose: str, key: int) -> int:
    """A seed in [0, 2⁶³), for what takes a seed and no generator."""
    return int.from_bytes(_digest(seed, purpose, key, 8), "little") >> 1


def randn(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers, float32."""
    numbers = torch.empty(1, math.prod(shape))
    _fill_with_normal(numbers, [generator])
    return numbers.view(shape)


def keyed_randn(seed: int, purpose: str, keys: Iterable[int], shape: Sequence[int], device=None) -> torch.Tensor:
    """Standard normal noise of shape (len(keys), *shape), float32; row i depends on keys[i] alone."""
    generators = [generator_for(seed, purpose, key) for key in keys]
    numbers = torch.empty(len(generators), math.prod(shape))
    at_once = max(1, ROOM // max(1, numbers.shape[1]))
    for start in range(0, len(generators), at_once):
        rows = slice(start, start + at_once)
        _fill_with_normal(numbers[rows], generators[rows])
    return to_device(numbers.view(-1, *shape), device)


def keyed_rand(
    seed: int, purpose: str, keys: Iterable[int], shape: Sequence[int] = (), dtype: type = np.float64
) -> torch.Tensor:
    """Numbers uniform in [0, 1), shape (len(keys), *shape); row i depends on keys[i] alone. They stay on the CPU: not
    every device has float64, and rounding to float32 would make 1 of some. Those drawn as float32 have 24 bits."""
    rows = [generator_for(seed, purpose, key).random(tuple(shape), dtype) for key in keys]
    return torch.from_numpy(np.array(rows, dtype).reshape(len(rows), *shape))


def keyed_randint(seed: int, purpose: str, keys: Iterable[int], low: int, high: int) -> torch.Tensor:
    """Integers uniform in [low, high), shape (len(keys),), int64; entry i depends on keys[i] alone."""
    numbers = [int(generator_for(seed, purpose, key).integers(low, high)) for key in keys]
    return torch.tensor(numbers, dtype=torch.int64)


def _digest(seed: int, purpose: str, key: int, num_bytes: int) -> bytes:
    return hashlib.blake2b(f"{int(seed)}/{purpose}/{int(key)}".encode(), digest_size=num_bytes).digest()


class _Key(ISeedSequence):
    """Hands a bit generator its key as it is, where NumPy's own SeedSequence would mix it once more."""

    def __init__(self, key: bytes):
        self.key = key

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        return np.frombuffer(self.key, np.dtype(dtype).newbyteorder("<"))[:n_words]


def _fill_with_normal(numbers: torch.Tensor, generators: Sequence[np.random.Generator]) -> None:
    """Row i by generator i, by Box and Muller's transform: √(-2 ln u)·cos 2πv and √(-2 ln u)·sin 2πv of uniform numbers
    u in (0, 1) and v in [-½, ½), of 32 bits each. What another version of torch rounds otherwise in float64 is all but
    always rounded away in float32."""
    count = numbers.shape[1]
    half = -(-count // 2)
    words = [generator.bit_generator.random_raw(half) for generator in generators]
    words = np.stack(words) if len(words) > 1 else words[0][None]  # a large row is not copied
    bits = torch.from_numpy(words.view(np.int32))
    radius = bits[:, :half].double().add_(2**31 + 0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = bits[:, half:].double().mul_(2 * math.pi * 2**-32)
    torch.mul(radius, angle.cos(), out=numbers[:, :half])
    torch.mul(radius[:, : count - half], angle.sin_()[:, : count - half], out=numbers[:, half:])
