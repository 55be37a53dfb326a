import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from difftrain_utils.commands import ranks
from difftrain_utils.commands.compare import Run
from difftrain_utils.commands.ranks import agreement, cells_of, kendall_tau, ranks_table, tau_p
from difftrain_utils.errors import InputError


@pytest.mark.parametrize("num_values", [2, 3, 6, 1000])
def test_tau_is_scipys_also_with_ties(num_values):
    rng = np.random.default_rng(num_values)
    for size in (2, 3, 5, 9):
        for _ in range(10):
            x, y = rng.integers(0, num_values, (2, size)).tolist()
            expected = stats.kendalltau(x, y).statistic
            assert kendall_tau(x, y) == pytest.approx(expected, nan_ok=True)


def test_tau_of_orders_that_are_known():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # one of six pairs is reversed
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_p_is_the_share_of_all_orders(size):
    orders = [*itertools.permutations(range(size))]
    taus = np.array([kendall_tau(range(size), order) for order in orders])
    for order in orders[:: max(1, len(orders) // 12)]:
        expected = np.mean(np.abs(taus) >= abs(kendall_tau(range(size), order)) - 1e-9)
        assert tau_p(range(size), order) == pytest.approx(expected)
        assert tau_p(range(size), order) == pytest.approx(stats.kendalltau(range(size), order, method="exact").pvalue)
    assert tau_p([1, 1, 2], [1, 2, 3]) is None


def run(name: str, seed: int, loss: str, width: int, values: list[float]) -> Run:
    """One that was evaluated at the steps 10, 20, …"""
    config = {"train.seed": seed, "loss.type": loss, "model.width": width, "train.output_dir": name}
    metrics = [{"step": 10 * i, "validation_loss_ema": value, "fid": -value} for i, value in enumerate(values, 1)]
    return Run(Path(name), name, config, {}, metrics)


RUNS = [
    run(f"{loss}-{seed}", seed, loss, 64, [value + 0.1 * seed for value in values])
    for loss, values in {"mse": [3, 2, 1], "huber": [4, 3, 2], "l1": [2, 4, 3]}.items()
    for seed in (0, 1)
]


def test_the_table_over_steps():
    assert ranks_table(cells_of(RUNS, [], "validation_loss")) == [
        ["setting", "10", "20", "30"],
        ["mse", "3.050", "2.050", "1.050"],
        ["huber", "4.050", "3.050", "2.050"],
        ["l1", "2.050", "4.050", "3.050"],
        ["tau with the last", "-0.33", "1.00", "1.00"],
        ["p, if orders were random", "1", "0.33", "–"],
        ["tau between seeds", "1.00", "1.00", "1.00"],
    ]


def test_the_table_over_a_field_is_of_the_last_evaluations():
    wide = [run(f"{loss}-wide", 0, loss, 128, [0, value]) for loss, value in (("mse", 3), ("huber", 2), ("l1", 1))]
    rows = ranks_table(cells_of([*RUNS, *wide], ["model.width"], "fid"))
    assert rows[0] == ["setting", "64", "128"] and rows[1] == ["mse", "-1.050", "-3.000"]
    assert rows[4] == ["tau with the last", "-1.00", "1.00"] and rows[6] == ["tau between seeds", "1.00", "–"]
    with pytest.raises(InputError, match=r"--over model.width: not all settings have runs with 128"):
        cells_of([*RUNS, wide[0]], ["model.width"], "fid")


def test_runs_that_differ_in_the_seed_of_one_source_are_one_setting():
    runs = [run("mse-2", 0, "mse", 64, [3.2, 2.2, 1.2]), run("huber-2", 0, "huber", 64, [4.2, 3.2, 2.2])]
    for more in runs:
        more.config["train.seeds.noise"] = 2
    cells = cells_of([*RUNS, *runs], [], "validation_loss")
    assert [*map(len, (own["10"] for own in cells.values()))] == [3, 3, 2]
    again = run("mse-again", 0, "mse", 64, [1, 1, 1])
    again.config |= {"train.seeds.noise": 2}
    message = "mse-again: another run of its setting has the seeds 0 of weights, 0 of data, 2 of noise"
    with pytest.raises(InputError, match=message):
        cells_of([*RUNS, *runs, again], [], "validation_loss")


def test_seeds_that_do_not_agree():
    assert agreement([{0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0}, {0: 3.0, 1: 1.0}]) == -1
    assert agreement([{0: 1.0, 1: 3.0}, {0: 2.0}]) is None


@pytest.mark.parametrize(
    ("runs", "over", "metric", "message"),
    [
        (RUNS[:2], [], "validation_loss", "difftrain ranks: all runs are one setting"),
        (RUNS, [], "kid", "mse-0: has no kid"),
        ([*RUNS, RUNS[0]], [], "fid", "mse-0: another run of its setting has seed 0"),
        (RUNS, ["model.width"], "fid", "difftrain ranks: needs two columns or more, got 64"),
    ],
)
def test_what_is_refused(runs, over, metric, message, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=f"^{message}"):
        cells_of(runs, over, metric)
    monkeypatch.setattr(ranks, "load_runs", lambda _: RUNS)
    with pytest.raises(InputError, match=r"--over: the configs have no field 'model.depth'"):
        ranks.main([str(tmp_path), "--over", "model.depth"])
