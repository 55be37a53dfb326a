"""What a sweep has found, from the folders of its runs alone: the rates that were chosen, the verdicts, what each
strategy costs, and which of the seeds make the spread."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftrain_utils.commands import compare_html as html
from difftrain_utils.commands.compare import (
    Compared,
    Metric,
    Run,
    has_levels,
    held_against,
    load_run,
    mean_and_sd,
    number,
    percent,
    series,
    text_table,
    validation_losses,
)
from difftrain_utils.commands.sweep_plan import COMPARE, CONTROL, TUNE, VARIANCE, Plan, PlannedRun
from difftrain_utils.commands.verdicts import deviation_interval
from difftrain_utils.config.training import SOURCES
from difftrain_utils.run.run_folder import DIVERGED, read_manifest

FINISHED, UNFINISHED, ABSENT = "finished", "unfinished", "absent"  # or DIVERGED
FEW = 5  # of fewer runs there is no share of the variance: of four and four its interval is 15-fold each way
AXES = ("steps", "samples", "FLOPs", "seconds")
Table = tuple[str, list[list[str]], list[str]]  # what it shows, header and rows, and sentences about it


@dataclass
class Choice:
    """How the learning rates of a strategy did, the lower the better (infinite: it diverged with a seed), from low to
    high, and the best of them; None: not all are tried yet, or none of them trains."""

    scores: dict[float, float | None]
    diverged: dict[float, int]
    rate: float | None

    @property
    def is_complete(self) -> bool:
        return None not in self.scores.values()

    @property
    def is_hopeless(self) -> bool:
        """It diverged at each rate."""
        return self.is_complete and self.rate is None and len(self.scores) > 1

    @property
    def is_at_edge(self) -> bool:
        """The best rate may lie outside of those that were tried."""
        return self.rate is not None and len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


# ── The runs ─────────────────────────────────────────────────────────────────────────────────────────────────
def status_of(folder: Path) -> str:
    """Of a run, by its manifest."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return ABSENT
    if "final" in manifest:
        return FINISHED
    return DIVERGED if manifest["segments"] and manifest["segments"][-1].get("reason") == DIVERGED else UNFINISHED


def loaded(run: PlannedRun) -> Run:
    return load_run(run.folder, "/".join(run.folder.parts[-2:]))


def finished_runs(plan: Plan, stage: str, called: str) -> list[Run]:
    """Of a strategy, or of what varies."""
    of_stage = [run for run in plan.runs() if run.stage == stage and run.folder.parent.name == called]
    return [loaded(run) for run in of_stage if status_of(run.folder) == FINISHED]


def measured(run: Run, metric: Metric | None) -> list[tuple[int, float]]:
    """(step, value) of what decides: of the metric, or of the geometric mean of the validation losses over the noise
    levels, as the verdicts take it; of the EMA weights if they were validated. Of a run without noise levels it is the
    one validation loss; nan where a loss is not above 0."""
    if metric is not None:
        return series(run, metric.name)
    for name in ("validation_loss_ema_bins", "validation_loss_bins"):
        if found := [(entry["step"], geometric_mean(entry[name])) for entry in run.metrics if has_levels(entry, name)]:
            return found
    return [(step, geometric_mean([loss])) for step, loss in validation_losses(run)]


def geometric_mean(losses: list[float]) -> float:
    is_positive = all(math.isfinite(loss) and loss > 0 for loss in losses)
    return math.exp(statistics.fmean(map(math.log, losses))) if is_positive else math.nan


def score(run: Run, metric: Metric | None) -> float:
    """The lower, the better: the metric's last value, or that times -1, or the logarithm of the geometric mean.
    Infinite where it is not a number.

    Raises:
        ValueError: the run has no such metric.
    """
    last = measured(run, metric)[-1:]
    if not last:
        raise ValueError(f"no {metric.name if metric else 'validation loss'}")
    value = last[0][1]
    if not math.isfinite(value):
        return math.inf
    return math.log(value) if metric is None else value if metric.best == "lowest" else -value


def value_of(found: float, metric: Metric | None) -> float:
    """What a score is of: the metric's value, or the geometric mean."""
    if metric is None:
        return math.exp(found) if found < 700 else math.inf
    return -found if metric.best == "highest" else found


def choose_rate(plan: Plan, strategy: str) -> Choice:
    """The rate with the best mean over the tuning seeds; a run that diverged counts as worst."""
    rates, metric = plan.rates_of(strategy), plan.what_decides
    if not plan.is_tuned(strategy):
        return Choice({rate: math.nan for rate in rates}, {}, rates[0] if rates else None)
    scores: dict[float, list[float | None]] = {rate: [] for rate in rates}
    diverged = dict.fromkeys(rates, 0)
    for run in plan.runs():
        if run.stage == TUNE and run.strategy == strategy:
            status = status_of(run.folder)
            diverged[run.rate] += status == DIVERGED
            found = score(loaded(run), metric) if status == FINISHED else None
            scores[run.rate].append(math.inf if status == DIVERGED else found)
    means = {rate: None if None in found else statistics.fmean(found) for rate, found in scores.items()}
    best = None if None in means.values() else min(means, key=means.get)
    return Choice(means, diverged, best if best is not None and math.isfinite(means[best]) else None)


# ── What it costs ────────────────────────────────────────────────────────────────────────────────────────────
def costs_at(run: Run, steps: Sequence[float]) -> dict[str, np.ndarray]:
    """What a run had cost by these steps, by axis: nan where it did not record it. Seconds are those of its steps,
    without evaluating and saving."""
    batch_size = run.config.get("train.batch_size") or math.nan
    done, seconds, last = [0], [0.0], 0
    for step, speed in series(run, "samples_per_second"):
        done.append(step)
        seconds.append(seconds[-1] + (step - last) * batch_size / speed)
        last = step
    flops = [(0, 0), *series(run, "flops")]

    def at(known: list[float], values: list[float]) -> np.ndarray:
        return np.interp(steps, known, values) if len(known) > 1 else np.full(len(steps), math.nan)

    return {
        "steps": np.asarray(steps, float),
        "samples": np.asarray(steps, float) * batch_size,
        "FLOPs": at(*map(list, zip(*flops, strict=True))),
        "seconds": at(done, seconds),
    }


@dataclass
class Curve:
    """The means over a strategy's runs: the metric at the steps where all have it, and what they had cost by then, by
    axis."""

    values: np.ndarray
    costs: dict[str, np.ndarray]

    def reaches(self, value: float, best: str) -> int | None:
        """The first place where it is at least as good as `value`."""
        is_good = self.values <= value if best == "lowest" else self.values >= value
        return int(np.argmax(is_good)) if is_good.any() else None


def curve_of(runs: list[Run], metric: Metric | None) -> Curve | None:
    """None: there is no step at which all runs have the metric."""
    points = [dict(measured(run, metric)) for run in runs]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    if not steps:
        return None
    values = np.array([[of_run[step] for step in steps] for of_run in points]).mean(0)
    costs = [costs_at(run, steps) for run in runs]
    return Curve(values, {axis: np.array([cost[axis] for cost in costs]).mean(0) for axis in AXES})


def cost_table(curves: dict[str, Curve], baseline: str, best: str, name: str) -> list[list[str]]:
    """What each strategy cost, and how soon it was where the baseline ended, as shares of the baseline's cost; and the
    metric where each had cost as much as the cheapest."""
    base = curves[baseline]
    rows = [["setting", *AXES, *(f"{axis} to it" for axis in AXES), "at equal FLOPs", "at equal seconds"]]
    for setting, curve in curves.items():
        place = curve.reaches(base.values[-1], best)
        total = [amount(curve.costs[axis][-1]) for axis in AXES]
        to_it = ["never"] * len(AXES)
        if place is not None:
            to_it = [share(curve.costs[axis][place], base.costs[axis][-1]) for axis in AXES]
        equal = []
        for axis in ("FLOPs", "seconds"):
            budget = min(other.costs[axis][-1] for other in curves.values())
            within = np.nonzero(curve.costs[axis] <= budget * (1 + 1e-9))[0]
            equal.append(number(curve.values[within[-1]]) if len(within) else "–")
        rows.append([setting, *total, *to_it, *equal])
    return rows


def amount(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def share(value: float, whole: float) -> str:
    return "–" if math.isnan(value) or not whole > 0 else f"{value / whole:.2f}"


# ── The seeds ────────────────────────────────────────────────────────────────────────────────────────────────
def variance_table(plan: Plan) -> tuple[list[list[str]], list[str]]:
    """The spread of the baseline where one source's seed alone varies, and where all do, and what is to be said of it;
    a header alone where the plan has no such runs that are finished. Of few runs there is no share."""
    metric, rows = plan.what_decides, [["seeds of", "runs", "sd", "95 % interval of it", "share of the variance"]]
    everything = finished_runs(plan, COMPARE, plan.baseline)
    first = [run for run in everything if run.config.get("train.seed") == plan.seeds[0]]
    sources = {source: [*first, *finished_runs(plan, VARIANCE, source)] for source in SOURCES}
    if not plan.variance_seeds:
        return rows, []
    total = statistics.stdev(score(run, metric) for run in everything) if len(everything) >= FEW else 0.0
    for source, runs in ({"all": everything} | sources).items():
        if len(runs) > 1:
            sd = statistics.stdev(score(run, metric) for run in runs)
            ends = deviation_interval(sd, len(runs))
            shown = [percent(v).removeprefix("+") if metric is None else f"{v:.3g}" for v in (sd, *ends)]
            cells = [
                str(len(runs)),
                shown[0],
                f"{shown[1]} to {shown[2]}",
                f"{100 * sd**2 / total**2:.0f} %" if total and len(runs) >= FEW else "–",
            ]
            rows.append([source, *cells])
    is_few = any(int(row[1]) < FEW for row in rows[1:])
    return rows, [f"Fewer than {FEW} runs, in a row or of all, are too few for a share of the variance."] * is_few


# ── All of it ────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Findings:
    """Of a sweep: its tables, each with what it shows and what is to be said of it; by setting, the curve, the rate and
    the verdict; and the runs that are not done."""

    tables: list[Table]
    curves: dict[str, Curve]
    choices: dict[str, Choice]
    results: dict[str, Compared]
    missing: list[PlannedRun]

    def as_text(self) -> str:
        parts = []
        for title, rows, sentences in self.tables:
            parts += [textwrap.fill(title, 120), text_table(rows), "\n".join(sentences)]
        return "\n\n".join(part for part in parts if part)

    def as_html(self, title: str, name: str) -> str:
        parts = []
        for what, rows, sentences in self.tables:
            parts += [html.paragraph(what), html.table(rows, "values"), *map(html.paragraph, sentences)]
        for axis in AXES:
            curves = {setting: (curve.costs[axis], curve.values) for setting, curve in self.curves.items()}
            points = [
                (setting, list(zip(*map(np.ndarray.tolist, c), strict=True)), []) for setting, c in curves.items()
            ]
            points = [(setting, [p for p in of_it if math.isfinite(p[0])], []) for setting, of_it, _ in points]
            parts.append(html.chart(f"{name} by {axis}", axis, points))
        return html.page(title, parts)


def findings(plan: Plan) -> Findings:
    """What is known by now; a strategy has a verdict when all its runs, and the baseline's, are done."""
    metric, name = plan.what_decides, plan.measure
    best = metric.best if metric else "lowest"
    choices = {strategy: choose_rate(plan, strategy) for strategy in plan.strategies}
    missing = [
        run
        for run in plan.runs()
        if status_of(run.folder) not in (FINISHED, DIVERGED)
        and (run.stage == TUNE or not choices[run.strategy].is_hopeless)
    ]
    runs = {called: finished_runs(plan, COMPARE, called) for called in (*plan.strategies, CONTROL)}
    curves = {called: curve for called in plan.strategies if (curve := curve_of(runs[called], metric))}
    tables, results = [], {}
    if any(map(plan.is_tuned, plan.strategies)):
        tables.append(tuning_table(plan, choices))
    tables += verdict_tables(plan, choices, runs, results)
    if plan.control_seeds:
        tables.append(control_table(plan, choices, runs, results))
    if plan.baseline in curves:
        what = f"What they cost (means of the runs), how soon the {name} was where the baseline ended (as shares of "
        what += f"its whole cost), and the {name} where each had cost as much as the cheapest in all:"
        tables.append((what, cost_table(curves, plan.baseline, best, name), []))
    rows, sentences = variance_table(plan)
    if len(rows) > 1:
        of = f"the logarithm of the {name}" if metric is None else name
        what = f"What makes the spread of {plan.baseline}: {of}, where the seeds of one source alone vary."
        tables.append((what, rows, sentences))
    if missing:
        tables.append((f"{len(missing)} of {len(plan.runs())} runs are not done:", missing_table(missing), []))
    return Findings(tables, curves, choices, results, missing)


def tuning_table(plan: Plan, choices: dict[str, Choice]) -> Table:
    metric, rows, sentences = plan.what_decides, [["setting", "chosen", "tried"]], []

    def shown(found: float | None, diverged: int) -> str:
        if diverged:
            return f"diverged with {diverged} of {len(plan.tuning_seeds)} seeds"
        return "…" if found is None else number(value_of(found, metric))

    for strategy, choice in choices.items():
        if not plan.is_tuned(strategy):
            continue
        tried = [f"{rate:g}: {shown(score, choice.diverged[rate])}" for rate, score in choice.scores.items()]
        rows.append([strategy, rate_of(choice), "; ".join(tried)])
        if choice.is_at_edge:
            sentences.append(
                f"{strategy}: {choice.rate:g} is at the edge of the rates that were tried; the best may lie outside."
            )
        elif choice.is_complete and choice.rate is None:
            sentences.append(f"{strategy}: no rate trains.")
    return f"Learning rates, each with the seeds {plan.tuning_seeds}: {plan.measure}.", rows, sentences


def verdict_tables(
    plan: Plan, choices: dict[str, Choice], runs: dict[str, list[Run]], results: dict[str, Compared]
) -> list[Table]:
    """The strategies against the baseline, and by noise level; `results` get what is found."""
    metric, base, contest = plan.what_decides, runs[plan.baseline], None
    whole = {name: runs[name] for name in plan.strategies if len(runs[name]) == len(plan.seeds)}
    if whole.pop(plan.baseline, None) and whole:
        contest = held_against(base, plan.baseline, whole, plan.looks, metric)
        results.update(zip(whole, contest.results, strict=True))
    header = ["setting", "rate", f"{plan.measure}, mean ± sd", "seeds", "difference", "95 % interval"]
    rows = [[*header, *(contest.rows[0][4:] if contest else ["", "p (Holm)", "verdict"])]]
    found = {row[0]: row[1:] for row in contest.rows[1:]} if contest else {}
    for strategy in plan.strategies:
        if strategy not in found:
            why = why_no_verdict(plan, strategy, choices, runs)
            found[strategy] = [str(len(runs[strategy])), *["–"] * 4, why]
            if strategy != plan.baseline:
                results[strategy] = Compared(None, verdict=why)
        rows.append([strategy, rate_of(choices[strategy]), spread_of(runs[strategy], metric), *found[strategy]])
    if contest is None:
        return [(f"Against {plan.baseline}, when all seeds are run.", rows, [])]
    bins = [("The difference by noise level:", contest.bins, [])] if contest.bins else []
    return [(contest.introduction, rows, contest.sentences), *bins]


def control_table(
    plan: Plan, choices: dict[str, Choice], runs: dict[str, list[Run]], results: dict[str, Compared]
) -> Table:
    """The baseline against itself, with other seeds."""

    def in_turn(own: list[Run], base: list[Run]) -> list[tuple[Run, Run]]:
        return list(zip(own, base, strict=True))

    base, own = runs[plan.baseline], runs[CONTROL]
    what = (
        f"A control in which nothing differs: {plan.baseline} with the seeds {plan.control_seeds}, run by run against "
    )
    what += "its others. A difference is called in at most 5 % of such controls; other seeds make it a wider interval."
    if len(own) < len(plan.control_seeds) or len(base) < len(plan.seeds):
        return what, [["setting", "verdict"], [CONTROL, why_no_verdict(plan, CONTROL, choices, runs)]], []
    contest = held_against(base, plan.baseline, {CONTROL: own}, 1, plan.what_decides, in_turn)
    results[CONTROL] = contest.results[0]
    return what, contest.rows, contest.sentences


def why_no_verdict(plan: Plan, called: str, choices: dict[str, Choice], runs: dict[str, list[Run]]) -> str:
    """Of a strategy, or the control, that is not compared."""
    for name in (called, plan.baseline):
        planned = [run for run in plan.runs() if run.stage == COMPARE and run.folder.parent.name == name]
        states = [status_of(run.folder) for run in planned]
        if name in choices and choices[name].is_hopeless:
            return f"{name} diverged at each rate"
        if diverged := states.count(DIVERGED):
            return f"{name} diverged with {diverged} of {len(planned)} seeds"
        if len(runs[name]) < len(planned):
            return f"{len(runs[name])} of {len(planned)} seeds of {name} are run"
    return "baseline"


def rate_of(choice: Choice) -> str:
    if choice.rate is None:
        return "none" if choice.scores and choice.is_complete else "…" if choice.scores else "the config's"
    return f"{choice.rate:g}{' (edge)' if choice.is_at_edge else ''}"


def spread_of(runs: list[Run], metric: Metric | None) -> str:
    """Mean and standard deviation over the runs; of one the mean alone."""
    last = [measured(run, metric)[-1:] for run in runs]
    spread = mean_and_sd([found[0][1] if found else None for found in last]) if runs else None
    if spread is None:
        return "–"
    return number(spread[0]) + ("" if math.isnan(spread[1]) else f" ± {number(spread[1], 2)}")


def missing_table(missing: list[PlannedRun]) -> list[list[str]]:
    shown = [[str(run.folder), status_of(run.folder)] for run in missing[:10]]
    more = len(missing) - len(shown)
    return [["run", ""], *shown, *([[f"and {more} more", ""]] if more else [])]
