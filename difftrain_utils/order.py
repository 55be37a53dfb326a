"""Which row sample k has: epochs that take each row once, sources with weights, batches of one shape.

All of it is a function of (config, seed, k): the order of an epoch is drawn from (seed, epoch), so that any sample is
found without those before it.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from difftrain_utils.errors import InputError
from difftrain_utils.keyed_random import generator_for


class Order:
    """`order[k]` is the row of sample k, for sources of `lengths` rows.

    Without `weights` an epoch takes each row once. With them it has as many samples, and each source its share of them:
    the next rows of an endless shuffle of the source, in which a row comes again after all the others.

    With `buckets`, the bucket of each row, all samples of a batch [s·batch_size, (s+1)·batch_size) are of one bucket.
    The rows of a bucket that make no whole batch are left out of the epoch: others in each.

    Raises:
        InputError: a weight is too small for one sample in an epoch, or no bucket has a batch of images.
    """

    def __init__(
        self,
        seed: int,
        lengths: Sequence[int],
        weights: Sequence[float] | None = None,
        buckets: np.ndarray | None = None,
        batch_size: int = 1,
    ):
        self.seed, self.num_rows, self.batch_size = seed, sum(lengths), batch_size
        self.buckets = None if buckets is None else torch.as_tensor(buckets)
        self.groups = None  # with weights: (rows, samples in an epoch) of each source, and bucket in it
        if weights is not None:
            self.groups = []
            sources = torch.arange(self.num_rows).split(list(lengths))
            for i, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
                parts = [rows] if buckets is None else [rows[self.buckets[rows] == b] for b in self.buckets.unique()]
                share = weight / sum(weights) * self.num_rows
                counts = [round(share * len(part) / len(rows)) for part in parts]
                if not any(counts):
                    raise InputError(f"data.sources: source {i + 1} has {share:.2g} samples an epoch by its weight")
                self.groups += [(part, count) for part, count in zip(parts, counts, strict=True) if count]
        self._order = functools.lru_cache(maxsize=2)(self._draw)  # a batch touches two epochs, unless they are tiny
        self.epoch_length = len(self._order(0))
        if self.epoch_length == 0:
            raise InputError(f"data.buckets: no bucket has the {batch_size} images of a batch (train.batch_size)")

    def __getitem__(self, k: int) -> int:
        epoch, position = divmod(k, self.epoch_length)
        return self._order(epoch)[position].item()

    def __getstate__(self):  # for the workers of a data loader where they are not forked
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> torch.Tensor:
        if self.groups is not None:
            rows = torch.cat([self._next_rows(*group, i, epoch) for i, group in enumerate(self.groups)])
        else:
            rows = torch.arange(self.num_rows)
        rows = rows[self._permutation("order", epoch, len(rows))]
        if self.buckets is None:
            return rows
        bucket, batches = self.buckets[rows], []
        for b in bucket.unique():
            mine = rows[bucket == b]
            batches.append(mine[: len(mine) // self.batch_size * self.batch_size].view(-1, self.batch_size))
        batches = torch.cat(batches)
        return batches[self._permutation("batch_order", epoch, len(batches))].flatten()

    def _next_rows(self, rows: torch.Tensor, count: int, group: int, epoch: int) -> torch.Tensor:
        """Those from position epoch·count on in the endless shuffle of a group's rows."""
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(rows), -(-last // len(rows)))
        shuffled = torch.cat([rows[self._permutation(f"order_of_group_{group}", p, len(rows))] for p in passes])
        start = first - passes[0] * len(rows)
        return shuffled[start : start + count]

    def _permutation(self, purpose: str, key: int, length: int) -> torch.Tensor:
        return torch.randperm(length, generator=generator_for(self.seed, purpose, key))


class Buckets:
    """The size (height, width) that each image is resized and cropped to: that of the nearest aspect ratio, so that
    cropping cuts off least.

    A bucket with fewer images than a batch is left out, the smallest first, and its images go to the nearest of the
    others. `sizes` (n, 2) are the images' (height, width); one of 0, which cannot be read, counts as square.
    """

    def __init__(self, sizes: np.ndarray, buckets: Sequence[tuple[int, int]], batch_size: int):
        heights, widths = np.where(sizes > 0, sizes, 1).T
        ratios, inverse = np.unique(widths / heights, return_inverse=True)
        self.sizes = sorted(map(tuple, buckets), key=lambda size: size[1] / size[0])
        while True:
            of_buckets = np.log([width / height for height, width in self.sizes])
            self.of_row = np.abs(np.log(ratios)[:, None] - of_buckets).argmin(1)[inverse].astype(np.int16)
            self.counts = np.bincount(self.of_row, minlength=len(self.sizes))
            if len(self.sizes) == 1 or self.counts.min() >= batch_size:
                break
            self.sizes.pop(self.counts.argmin())
        targets = np.array(self.sizes)[self.of_row]
        self.cropped = cropped_share(np.stack([heights, widths], 1), targets)
        self.remainder = int((self.counts % batch_size).sum())

    def size_of(self, row: int) -> tuple[int, int]:
        return self.sizes[self.of_row[row]]

    def describe(self) -> str:
        """What to tell of them: how many images each has, what cropping cuts off, what an epoch leaves out."""
        counts = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(self.sizes, self.counts, strict=True))
        return (
            f"Buckets (height x width: images): {counts}; cropping cuts off {self.cropped.mean():.1%} of an image's area "
            f"(at most {self.cropped.max():.1%}); an epoch leaves out {self.remainder} images, others each time"
        )


def cropped_share(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The share of each image's area that is cut off when it is scaled to cover its target: 1 - min(r/R, R/r) for the
    aspect ratios r and R. Both have the shape (n, 2), as (height, width)."""
    quotient = (sizes[:, 1] * targets[:, 0]) / (sizes[:, 0] * targets[:, 1])
    return 1 - np.minimum(quotient, 1 / quotient)
