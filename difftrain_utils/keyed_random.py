"""Random numbers that are a function of (seed, purpose, key), never of what was drawn before.

Sample k of a run is drawn from the key k, so a resumed run, another number of processes or another
gradient accumulation sees the same sample. Numbers are drawn on the CPU in float32 and moved, so
every device sees the same ones.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from difftrain_utils.devices import to_device


def generator_for(seed: int, purpose: str, key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments.

    `purpose` names what is drawn ("noise", "timestep", …): two purposes never share numbers, so
    adding a new draw to a fork leaves the old ones as they were.
    """
    return torch.Generator().manual_seed(seed_for(seed, purpose, key))


def seed_for(seed: int, purpose: str, key: int) -> int:
    """The seed of `generator_for`, in [0, 2⁶³), for what takes a seed and no generator."""
    digest = hashlib.blake2b(f"{int(seed)}/{purpose}/{int(key)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_randn(seed: int, purpose: str, keys: Iterable[int], shape: Sequence[int], device=None) -> torch.Tensor:
    """Standard normal noise of shape (len(keys), *shape), float32; row i depends on keys[i] alone."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in _generators(seed, purpose, keys)]
    return to_device(torch.stack(rows), device)


def keyed_rand(seed: int, purpose: str, keys: Iterable[int], device=None) -> torch.Tensor:
    """Numbers uniform in [0, 1), shape (len(keys),), float32; entry i depends on keys[i] alone."""
    rows = [torch.rand((), generator=generator) for generator in _generators(seed, purpose, keys)]
    return to_device(torch.stack(rows), device)


def keyed_randint(seed: int, purpose: str, keys: Iterable[int], low: int, high: int, device=None) -> torch.Tensor:
    """Integers uniform in [low, high), shape (len(keys),), int64; entry i depends on keys[i] alone."""
    rows = [torch.randint(low, high, (), generator=generator) for generator in _generators(seed, purpose, keys)]
    return to_device(torch.stack(rows), device)


def _generators(seed: int, purpose: str, keys: Iterable[int]) -> Iterator[torch.Generator]:
    """`generator_for` each key in turn: one generator, seeded anew, because making one takes longer."""
    generator = torch.Generator()
    for key in keys:
        yield generator.manual_seed(seed_for(seed, purpose, key))
