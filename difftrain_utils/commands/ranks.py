"""Say whether settings keep their order when the budget or the model is another.

    difftrain ranks runs/baseline-* runs/huber-* runs/min_snr-*
    difftrain ranks runs/small-* runs/large-* --over model.pretrained_model_name_or_path --metric scenes_right

A RUN is a run's output folder. Runs that differ only in their seeds, and in the fields of --over, are one setting, of
which the mean over the seeds counts. Without --over the columns are the steps at which all runs were evaluated, with it
the values of its first field, each by the last evaluation. Under each column is Kendall's tau-b with the last one: 1 is
the same order, 0 no relation, -1 the reverse.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difftrain_utils.commands.compare import (
    IGNORED,
    SEEDS,
    Run,
    as_text,
    brief,
    group_names,
    load_runs,
    number,
    seeds_of,
    series,
    text_table,
    validation_losses,
)
from difftrain_utils.commands.parser import Parser
from difftrain_utils.config.training import SOURCES
from difftrain_utils.errors import InputError
from difftrain_utils.terminal import printable

LOSS = "validation_loss"
Seeds = tuple[int | None, ...]
Cells = dict[str, dict[Seeds, float]]
"""Of a setting: by column the metric of each run, by its seeds (`seeds_of`)."""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain ranks", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="output folder of a run")
    over = "field whose values are the columns, and fields that differ with it, such as a rate; default: steps"
    parser.add_argument("--over", metavar="FIELD", nargs="+", default=[], help=over)
    parser.add_argument("--metric", metavar="NAME", default=LOSS, help=f"of metrics.jsonl; default: {LOSS}, of the EMA")
    args = parser.parse_args(argv)
    runs = load_runs(args.runs)
    for field in args.over:
        if not any(field in run.config for run in runs):
            raise InputError(f"--over: the configs have no field {field!r}")
    print(printable(text_table(ranks_table(cells_of(runs, args.over, args.metric)))))


def cells_of(runs: list[Run], over: Sequence[str], metric: str) -> dict[str, Cells]:
    """By the names of the settings. Raises InputError unless there are two settings or more, which have all columns,
    and no two runs of one setting, column and seed."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        config = {name: v for name, v in run.config.items() if name not in (*IGNORED, *SEEDS, *over)}
        settings.setdefault(as_text(config), []).append(run)
    if len(settings) < 2:
        raise InputError("difftrain ranks: all runs are one setting, which has no order")
    groups = group_names([*settings.values()])
    cells = {}
    for own in settings.values():
        values: Cells = {}
        for run in own:
            found = measured(run, metric)
            for column, value in [(run.config.get(over[0]), [*found.values()][-1])] if over else found.items():
                of_seeds, seeds = values.setdefault(brief(as_text(column)), {}), seeds_of(run)
                if seeds in of_seeds:
                    raise InputError(f"{run.folder}: another run of its setting has {_seeds_text(seeds)}")
                of_seeds[seeds] = value
        cells[groups.get(own[0].name, own[0].name)] = values
    shared = [column for column in next(iter(cells.values())) if all(column in own for own in cells.values())]
    if over and (missing := {column for own in cells.values() for column in own} - {*shared}):
        raise InputError(f"--over {over[0]}: not all settings have runs with {', '.join(sorted(missing))}")
    if len(shared) < 2:
        raise InputError(f"difftrain ranks: needs two columns or more, got {', '.join(shared) or 'none'}")
    return {name: {column: own[column] for column in shared} for name, own in cells.items()}


def _seeds_text(seeds: Seeds) -> str:
    """`seed 0`, or that of each source where they differ."""
    if len(set(seeds)) == 1:
        return f"seed {seeds[0]}"
    return "the seeds " + ", ".join(f"{seed} of {source}" for source, seed in zip(SOURCES, seeds, strict=True))


def measured(run: Run, metric: str) -> dict[int, float]:
    """Its values by step. Raises InputError if there are none."""
    if not (found := dict(validation_losses(run) if metric == LOSS else series(run, metric))):
        raise InputError(f"{run.folder}: has no {metric}")
    return found


def ranks_table(cells: dict[str, Cells]) -> list[list[str]]:
    """A row of means of each setting; tau with the last column, with its p; and how far single seeds agree."""
    columns = [*next(iter(cells.values()))]
    means = {column: [statistics.fmean(own[column].values()) for own in cells.values()] for column in columns}
    rows = [["setting", *columns]]
    rows += [[name, *(number(means[column][i]) for column in columns)] for i, name in enumerate(cells)]
    taus = [kendall_tau(means[column], means[columns[-1]]) for column in columns]
    rows.append(["tau with the last", *(f"{tau:.2f}" for tau in taus)])
    of_others = (_p_text(means[column], means[columns[-1]]) for column in columns[:-1])
    rows.append(["p, if orders were random", *of_others, "–"])
    agreements = [agreement([own[column] for own in cells.values()]) for column in columns]
    rows.append(["tau between seeds", *("–" if tau is None else f"{tau:.2f}" for tau in agreements)])
    return rows


def agreement(values: Sequence[dict[Seeds, float]]) -> float | None:
    """The mean tau between the orders by two single seeds, of those that all settings have; None: fewer than two. An
    order that changes no more than this between columns may be noise."""
    seeds = sorted(set.intersection(*(set(own) for own in values)), key=str)
    by_seed = [[own[seed] for own in values] for seed in seeds]
    taus = [kendall_tau(a, b) for a, b in itertools.combinations(by_seed, 2)]
    return statistics.fmean(taus) if taus else None


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b (Kendall 1945, "The treatment of ties in ranking problems"): concordant less discordant pairs,
    over the geometric mean of the pairs that are not tied in x, and in y. NaN where all are tied in one of them."""
    pairs = [(_sign(a - b), _sign(c - d)) for (a, c), (b, d) in itertools.combinations(zip(x, y, strict=True), 2)]
    untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
    return sum(a * b for a, b in pairs) / math.sqrt(untied) if untied else math.nan


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def tau_p(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The share of all orders whose tau with another is as far from 0 or further; None where there are ties.

    Of n things with k pairs in reverse order tau is 1 - 4k/(n² - n), and the number of orders with k such pairs is that
    of the first n - 1 with k - j, summed over the j < n of which the last is in front.
    """
    size = len(x)
    if len(set(x)) < size or len(set(y)) < size:
        return None
    counts = [1]
    for of in range(2, size + 1):
        counts = [sum(counts[max(0, k - of + 1) : k + 1]) for k in range(len(counts) + of - 1)]
    num_pairs, tau = size * (size - 1) // 2, abs(kendall_tau(x, y))
    far = [count for k, count in enumerate(counts) if abs(1 - 2 * k / num_pairs) >= tau - 1e-9]
    return sum(far) / sum(counts)


def _p_text(x: Sequence[float], y: Sequence[float]) -> str:
    p: Any = tau_p(x, y)
    return "–" if p is None else f"{p:.2g}"
