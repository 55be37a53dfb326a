import itertools
import time
from collections import Counter

import numpy as np
import pytest

from difftrain_utils.data.lanes import Lanes, Line, share_lanes
from difftrain_utils.errors import InputError

RAGGED = np.random.default_rng(1).integers(1, 90, 400)
UNITS_OF = np.random.default_rng(2).multinomial(360, np.ones(40) / 40) + 1  # of 40 files


def make_lanes(sizes=RAGGED, units_of=UNITS_OF, seed=3, batch=24, lanes=12, window=100, **fields) -> Lanes:
    return Lanes(seed, [(units_of, np.asarray(sizes))], batch, lanes, window, **fields)


def rows_at(lanes: Lanes, keys) -> list[tuple[int, int, int]]:
    places = [lanes[k] for k in keys]
    return [(w.source, int(w.units[i]), int(w.rows[i])) for w, i in places]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "units_of"), [(RAGGED, UNITS_OF), ([1000, 517], [2]), ([77], [1]), (np.full(50, 20), np.ones(50, int))]
)
def test_an_epoch_has_a_row_at_most_once_and_leaves_out_others_each_time(sizes, units_of, fixed):
    lanes = make_lanes(sizes, np.array(units_of), fixed=fixed)
    everything = {(0, unit, row) for unit, size in enumerate(sizes) for row in range(size)}
    left_out, orders = [], []
    for epoch in range(3):
        rows = rows_at(lanes, range(epoch * lanes.epoch_length, (epoch + 1) * lanes.epoch_length))
        assert len(set(rows)) == len(rows) == len(everything) // 24 * 24 and set(rows) <= everything
        left_out.append(everything - set(rows))
        orders.append(rows)
    if left_out[0]:
        assert len({frozenset(rows) for rows in left_out}) == 3
    assert len(set(map(tuple, orders))) == 3


def test_a_slot_of_a_batch_has_one_lane_with_windows_of_rows_that_lie_together():
    lanes, whole = make_lanes(), make_lanes(window=1)
    length = lanes.lines[0].length
    for lane in (0, 5, 11):
        keys = [step * 24 + lane * 2 + i for step in range(length // 2) for i in range(2)]
        shuffled, in_order = rows_at(lanes, keys), rows_at(whole, keys)
        first = 100 - lane * 100 // 12  # of the lane's first window: the starts are staggered
        for begin, end in itertools.pairwise([0, *range(first, length, 100), length]):
            assert sorted(shuffled[begin:end]) == sorted(in_order[begin:end])
            assert end - begin < 5 or shuffled[begin:end] != in_order[begin:end]
        files = np.repeat(np.arange(40), UNITS_OF)[[unit for _, unit, _ in in_order]]
        assert len(list(itertools.groupby(files))) == len(set(files))  # file after file
        assert Counter(unit for _, unit, _ in in_order).keys() == {
            unit for unit, _ in itertools.groupby(in_order, lambda row: row[1])
        }


def test_the_order_is_a_function_of_the_seed_and_stays_as_it_is():
    assert rows_at(make_lanes(), range(5000)) == rows_at(make_lanes(), range(5000))
    assert rows_at(make_lanes(seed=4), range(48)) != rows_at(make_lanes(), range(48))
    # a run of another version has to go on with the same samples
    assert [row[1:] for row in rows_at(make_lanes(), (0, 1, 2, 30, 10**6))] == [
        (52, 4),
        (56, 26),
        (387, 29),
        (262, 53),
        (71, 20),
    ]
    forwards, lanes = rows_at(make_lanes(), range(900)), make_lanes()
    for k in (700, 3, 899, 0, 701, 450):
        assert rows_at(lanes, [k]) == [forwards[k]]


def test_a_late_step_is_found_at_once():
    """Among ten million rows in 10,000 files, one lane of 1,024."""
    lanes = make_lanes(np.full(100_000, 100), np.full(10_000, 10), batch=4096, lanes=1024, window=1000)
    lanes[5]
    times = []
    for step in (10**6, 2 * 10**6, 3 * 10**6):
        start = time.perf_counter()
        lanes[4096 * step]
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # measured: 0.0007


def test_kept_lanes_keep_their_files():
    for fixed, least, most in ((True, 0.96, 1), (False, 0, 0.3)):
        line, kept = make_lanes(fixed=fixed).lines[0], []
        for lane in range(12):
            before, now = ({unit for unit, *_ in line.pieces(lane, epoch, 0, line.length)} for epoch in (0, 1))
            kept.append(len(before & now) / len(now))
        assert least <= np.mean(kept) <= most


def test_a_window_says_what_the_next_one_has():
    lanes = make_lanes(window=30)
    windows = list({id(w): w for w in (lanes[k].window for k in range(0, 24 * 700, 24))}.values())
    assert len(windows) > 40
    for window, following in itertools.pairwise(windows):
        assert set(window.ahead) == set(following.units.tolist())


def test_sources_share_the_lanes_by_weight(capsys):
    one, other, third = (np.full(n, 50) for n in (20, 40, 60))
    files = [(np.ones(len(sizes), int), sizes) for sizes in (one, other, third)]
    lanes = Lanes(0, files, 20, 10, 64, weights=[6, 3, 1])
    counts = Counter(source for source, *_ in rows_at(lanes, range(4000)))
    assert counts == {0: 2400, 1: 1200, 2: 400} and capsys.readouterr().err == ""
    assert lanes.epoch_length == 6000
    assert Counter(source for source, *_ in rows_at(Lanes(0, files, 12, 6, 64), range(600))) == {0: 100, 1: 200, 2: 300}
    assert share_lanes(4, [100, 1, 1]) == [2, 1, 1]
    warning = "data.sources[1].weight: asks for 1.0% of the samples, and gets 25.0%, 1 of 4 lanes (data.lanes)"
    assert warning in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^data.lanes: must be at least the 3 of data.sources, got 2$"):
        share_lanes(2, [1, 1, 1])


def test_too_few_rows_are_refused():
    with pytest.raises(InputError, match=r"^data.dataset: has 23 rows, fewer than its 24 of a batch \(train.batch_si"):
        make_lanes([23], np.array([1]))
    few = [(np.array([1]), np.array([n])) for n in (100, 3)]
    with pytest.raises(InputError, match=r"^data.sources\[1\].dataset: has 3 rows, fewer than its 4 of a batch"):
        Lanes(0, few, 8, 2, 10, weights=[1, 1])


def test_lanes_by_themselves():
    assert [Lanes(0, [(np.array([1]), np.array([99]))], n, None, 9).num_lanes for n in (1, 6, 12, 16, 22)] == [
        1,
        6,
        6,
        8,
        2,
    ]


@pytest.mark.parametrize(
    ("processes", "parts", "workers", "times"),
    [(1, 1, 1, 1), (4, 1, 3, 1), (12, 1, 1, 1), (2, 3, 2, 1), (1, 1, 5, 1.17), (24, 1, 1, 2), (8, 1, 1, 1.33)],
)
def test_who_reads_a_lane(processes, parts, workers, times):
    assert make_lanes().times_read(processes, parts, workers) == pytest.approx(times, abs=0.01)


def test_a_line_of_one_lane_and_file_is_its_rows():
    line = Line(0, "source 0", np.array([1]), np.array([10]), 1, 1, 100)
    assert list(line.pieces(0, 0, 2, 5)) == [(0, 2, 5)] and line.span(0, 13) == (1, 0, 10, 3)
