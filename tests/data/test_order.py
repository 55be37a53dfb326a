import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from difftrain_utils.data.order import Order
from difftrain_utils.errors import InputError
from difftrain_utils.keyed_random import generator_for


def epochs_of(order: Order, num_epochs: int) -> list[list[int]]:
    length = order.epoch_length
    return [[order[k] for k in range(e * length, (e + 1) * length)] for e in range(num_epochs)]


@pytest.mark.parametrize("lengths", [[7], [3, 4]])
def test_without_weights_an_epoch_is_one_shuffle_of_all_rows(lengths):
    order = Order(5, lengths)
    assert order.epoch_length == 7
    for epoch, rows in enumerate(epochs_of(order, 4)):
        assert rows == generator_for(5, "order", epoch).permutation(7).tolist()


def test_an_epoch_of_one():
    order = Order(0, [1])
    assert [order[k] for k in (0, 5, 10**9)] == [0, 0, 0]


class TestWeights:
    @pytest.mark.parametrize("weights", [[1, 1], [1, 3], [0.2, 0.2], [9, 1]])
    def test_the_shares_are_exact_in_each_epoch(self, weights):
        order = Order(0, [30, 10], weights)
        assert order.epoch_length == 40
        for rows in epochs_of(order, 5):
            assert sum(row < 30 for row in rows) == round(40 * weights[0] / sum(weights))

    @pytest.mark.parametrize("lengths", [[4, 3, 3], [5, 5, 6, 7, 8], [1, 2, 2]])
    def test_shares_that_are_no_whole_numbers_add_up_to_an_epoch(self, lengths):
        weights = [1.0] * len(lengths)
        order = Order(0, lengths, weights)
        assert order.epoch_length == sum(lengths)
        share = sum(lengths) / len(lengths)
        ends = np.cumsum(lengths)
        for rows in epochs_of(order, 3):
            counts = np.bincount(np.searchsorted(ends, rows, "right"), minlength=len(lengths))
            assert np.abs(counts - share).max() < 1

    def test_a_row_comes_again_only_after_all_others_of_its_source(self):
        """Those of a small source often, those of a large one never twice: the order in which each source's rows come
        is a sequence of shuffles of it, across the borders of epochs."""
        order = Order(3, [50, 6], [1, 1])
        seen = {0: [], 1: []}
        for rows in epochs_of(order, 9):  # within an epoch the sources are mixed, so count whole passes at its end
            for row in rows:
                seen[row >= 50].append(row)
            for source, first, length in ((0, 0, 50), (1, 50, 6)):
                counts = np.bincount(np.array(seen[source]) - first, minlength=length)
                assert counts.max() - counts.min() <= 1
        passes = [order._next_rows(*order.groups[1], 1, epoch) for epoch in range(3)]
        in_order = torch.cat(passes).view(-1, 6)
        assert (in_order.sort(1).values == torch.arange(50, 56)).all()
        assert len({tuple(p) for p in in_order.tolist()}) > 10

    def test_sources_are_mixed(self):
        rows = epochs_of(Order(0, [500, 500], [1, 1]), 1)[0]
        changes = sum((a < 500) != (b < 500) for a, b in pairwise(rows))
        assert 430 < changes < 570

    def test_a_weight_without_a_sample_is_refused(self):
        with pytest.raises(InputError, match=r"^data.sources\[1\].weight: gives 0.4 samples an epoch, below 1"):
            Order(0, [30, 10], [99, 1])


class TestBuckets:
    buckets = np.array([0] * 11 + [1] * 6 + [2] * 3, np.int16)[np.random.default_rng(0).permutation(20)]

    def test_batches_are_of_one_bucket_and_every_image_comes_once(self):
        order = Order(1, [20], buckets=self.buckets, batch_size=3)
        assert order.epoch_length == 18  # of 11 images 9
        left_out = []
        for rows in epochs_of(order, 12):
            batches = self.buckets[np.array(rows).reshape(-1, 3)]
            assert (batches == batches[:, :1]).all()
            assert len(set(rows)) == 18
            left_out.append(frozenset(range(20)) - set(rows))
        assert all(len(rows) == 2 and set(self.buckets[list(rows)]) == {0} for rows in left_out)
        assert len(set(left_out)) > 6 and len(frozenset.union(*left_out)) == 11

    def test_batches_of_all_buckets_are_mixed(self):
        buckets = np.repeat(np.arange(2), 200)
        rows = epochs_of(Order(1, [400], buckets=buckets, batch_size=2), 1)[0]
        firsts = buckets[np.array(rows[::2])]
        assert 70 < (firsts[1:] != firsts[:-1]).sum() < 130

    def test_where_no_bucket_has_a_batch_it_is_refused(self):
        with pytest.raises(InputError, match=r"^data.buckets: no bucket has the 12 samples of a batch"):
            Order(0, [20], buckets=self.buckets, batch_size=12)

    def test_with_weights(self):
        """Two sources over two buckets: batches of one bucket, shares by weight, rows of a source in turn."""
        buckets = np.array(([0] * 3 + [1]) * 30)  # 90 and 30
        order = Order(2, [80, 40], [1, 3], buckets, batch_size=4)
        assert 120 - 2 * 3 <= order.epoch_length <= 120 and order.epoch_length % 4 == 0
        counts = np.zeros(120, int)
        for rows in epochs_of(order, 40):
            batches = buckets[np.array(rows).reshape(-1, 4)]
            assert (batches == batches[:, :1]).all()
            assert abs(sum(row >= 80 for row in rows) - 90) <= 6
            counts += np.bincount(rows, minlength=120)
        # in 40 epochs a row of the first source is due 30 · 40 / 80 = 15 times, one of the second 90 · 40 / 40 = 90
        # times; what an epoch leaves out is a twentieth, and of a bucket a whole number
        for first, last, times in ((0, 80, 15), (80, 120, 90)):
            assert times * 0.7 < counts[first:last].min() and counts[first:last].max() <= times * 1.1
            assert counts[first:last].mean() == pytest.approx(times, rel=0.08)

    def test_many_buckets_do_not_round_a_source_away(self):
        """Each of a source's buckets has less than half a sample an epoch, the source four."""
        buckets = np.concatenate([np.zeros(390, int), np.arange(10)])
        order = Order(0, [390, 10], [99, 1], buckets, batch_size=1)
        assert order.epoch_length == 400
        assert all(sum(row >= 390 for row in rows) == 4 for rows in epochs_of(order, 3))

    def test_images_that_weights_leave_no_batch_are_reported(self, capsys):
        buckets = np.repeat([0, 1], [96, 4])
        Order(0, [50, 50], [1, 1], buckets, batch_size=4)
        assert capsys.readouterr().err == ""
        order = Order(0, [50, 50], [9, 1], buckets, batch_size=4)  # the bucket's images are all of the second source
        assert {row for rows in epochs_of(order, 20) for row in rows} <= set(range(96))
        assert (
            "warning: data.buckets: 4 images are never trained on: by data.sources' weights" in capsys.readouterr().err
        )


@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("buckets", [None, np.arange(20) % 3])
def test_a_function_of_seed_and_k_whatever_was_asked_before(weights, buckets):
    def make(seed: int = 0) -> Order:
        return Order(seed, [12, 8], weights, buckets, batch_size=2)

    expected = [make()[k] for k in range(90)]
    backwards, jumping = make(), make()
    assert [backwards[k] for k in reversed(range(90))][::-1] == expected
    for k in np.random.default_rng(0).permutation(90).tolist():
        assert jumping[k] == expected[k]
    copy = pickle.loads(pickle.dumps(jumping))
    assert [copy[k] for k in range(90)] == expected
    assert len(pickle.dumps(jumping)) == len(pickle.dumps(make()))  # no drawn epochs in it
    other = make(1)
    assert [other[k] for k in range(90)] != expected
