from types import SimpleNamespace

import numpy as np
import pytest
import torch

from difftrain_utils.data.clips import ClipBuckets
from difftrain_utils.evaluation import held_out
from difftrain_utils.evaluation.held_out import held_out_batches

SIZES = ((1, 32, 32), (5, 32, 48), (5, 48, 32))


class Videos(list):
    """Rows that are no more than their sizes."""

    def __init__(self, sizes):
        super().__init__(sizes)
        self.buckets = ClipBuckets(np.array(sizes), SIZES, 1)


@pytest.mark.parametrize("num_processes, batch_size", [(1, 8), (1, 2), (2, 3), (3, 2)])
def test_each_sample_is_seen_once_in_its_size_and_all_processes_see_one_size_at_a_time(
    monkeypatch, num_processes, batch_size
):
    rows = Videos([SIZES[i % 3] for i in (0, 1, 1, 2, 4, 1, 3)])
    read = lambda rows, keys, *_: torch.tensor([rows.buckets.size_of(key % len(rows)) for key in keys])  # noqa: E731
    monkeypatch.setattr(held_out, "read_held_out", read)
    config = SimpleNamespace(evaluation=SimpleNamespace(batch_size=batch_size, seed=0), data=None)
    kept, seen = [], []
    for index in range(num_processes):
        accelerator = SimpleNamespace(num_processes=num_processes, process_index=index)
        batches = list(held_out_batches(accelerator, rows, 20, config, "Looking"))
        assert all(len(keys) <= batch_size and (sizes == sizes[0]).all() for keys, _, sizes in batches)
        kept += [key for keys, num_kept, _ in batches for key in keys[:num_kept]]
        seen.append([(tuple(sizes[0].tolist()), len(keys)) for keys, _, sizes in batches])
    assert sorted(kept) == list(range(20))
    assert all(of_one == seen[0] for of_one in seen) and {size for size, _ in seen[0]} == set(SIZES)
