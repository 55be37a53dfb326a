"""Which row sample k has: epochs that take each row once, sources with weights, batches of one shape.

All of it is a function of (config, seed, k): the order of an epoch is drawn from (seed, epoch), so that any sample is
found without those before it.
"""

import collections
from collections.abc import Sequence

import numpy as np
import torch

from difftrain_utils.errors import InputError, warn
from difftrain_utils.keyed_random import generator_for


class Order:
    """`order[k]` is the row of sample k, for sources of `lengths` rows.

    Without `weights` an epoch takes each row once, or those of source i `repeats[i]` times. With weights it has as many
    samples as there are rows, and each source its share of them: the next rows of an endless shuffle of the source, in
    which a row comes again after all the others.

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
        repeats: Sequence[int] | None = None,
    ):
        self.seed, self.num_rows, self.batch_size = seed, sum(lengths), batch_size
        self.lengths, self.repeats = list(lengths), list(repeats or [1] * len(lengths))
        self.buckets = None if buckets is None else torch.as_tensor(buckets)
        self.groups = None  # with weights: (rows, samples in an epoch) of each source, and bucket in it
        if weights is not None:
            shares = np.array(weights) / sum(weights) * self.num_rows
            sources, parts = torch.arange(self.num_rows).split(list(lengths)), []
            of_row = torch.zeros(self.num_rows) if buckets is None else self.buckets
            for rows, share in zip(sources, shares, strict=True):
                of_source = [rows[of_row[rows] == bucket] for bucket in of_row.unique()]
                parts += [(part, share * len(part) / max(len(rows), 1)) for part in of_source]
            ends = np.rint(np.cumsum([share for _, share in parts])).astype(int)  # so they add up to an epoch
            counts = np.diff(ends, prepend=0)
            for i, of_source in enumerate(np.split(counts, len(sources))):
                if not of_source.any():
                    raise InputError(f"data.sources[{i}].weight: gives {shares[i]:.2g} samples an epoch, below 1")
            self.groups = [(rows, count) for (rows, _), count in zip(parts, counts.tolist(), strict=True) if count]
            self._warn_of_rows_left_out()
        self._epoch, self._rows = 0, self._draw(0)  # keys grow: the rows of one epoch at a time
        self.epoch_length = len(self._rows)
        if self.epoch_length == 0:
            raise InputError(f"data.buckets: no bucket has the {batch_size} samples of a batch (train.batch_size)")

    def __getitem__(self, k: int) -> int:
        epoch, position = divmod(k, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._draw(epoch)
        return int(self._rows[position])

    def __getstate__(self):  # for the workers of a data loader where they are not forked
        return vars(self) | {"_epoch": None, "_rows": None}

    def _warn_of_rows_left_out(self) -> None:
        """A bucket may have a batch of images, but by the weights not one in an epoch."""
        if self.buckets is None:
            return
        in_epoch = collections.Counter()
        for rows, count in self.groups:
            in_epoch[self.buckets[rows[0]].item()] += count
        full = [rows for rows, _ in self.groups if in_epoch[self.buckets[rows[0]].item()] >= self.batch_size]
        missed = self.num_rows - sum(map(len, full))
        if missed:
            warn(
                f"data.buckets: {missed} images are never trained on: by data.sources' weights their "
                f"buckets have no batch of {self.batch_size} in an epoch"
            )

    def _draw(self, epoch: int) -> np.ndarray:
        if self.groups is not None:
            rows = torch.cat([self._next_rows(*group, i, epoch) for i, group in enumerate(self.groups)])
        else:
            sources = torch.arange(self.num_rows).split(self.lengths)
            rows = torch.cat([rows.repeat(n) for rows, n in zip(sources, self.repeats, strict=True)])
        rows = rows[self._permutation("order", epoch, len(rows))]
        if self.buckets is None:
            return rows.numpy()
        bucket, batches = self.buckets[rows], []
        for b in bucket.unique():
            mine = rows[bucket == b]
            batches.append(mine[: len(mine) // self.batch_size * self.batch_size].view(-1, self.batch_size))
        batches = torch.cat(batches)
        return batches[self._permutation("batch_order", epoch, len(batches))].flatten().numpy()

    def _next_rows(self, rows: torch.Tensor, count: int, group: int, epoch: int) -> torch.Tensor:
        """Those from position epoch·count on in the endless shuffle of a group's rows."""
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(rows), -(-last // len(rows)))
        shuffled = torch.cat([rows[self._permutation(f"order_of_group_{group}", p, len(rows))] for p in passes])
        start = first - passes[0] * len(rows)
        return shuffled[start : start + count]

    def _permutation(self, purpose: str, key: int, length: int) -> torch.Tensor:
        return torch.from_numpy(generator_for(self.seed, purpose, key).permutation(length))
