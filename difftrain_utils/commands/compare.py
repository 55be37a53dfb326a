"""Compare runs: their results, whether one won, and whether the comparison is fair.

    difftrain compare runs/mse-0 runs/mse-1 runs/huber-0 runs/huber-1 --output report.html

A RUN is a run's output folder. Runs that differ only in their seeds form a setting, of which mean and sample standard
deviation are shown. Settings are compared with a baseline, seed by seed. --output also writes one self-contained HTML
file with curves and samples.
"""

import itertools
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from difftrain_utils.commands import compare_html as html
from difftrain_utils.commands.parser import Parser
from difftrain_utils.commands.verdicts import (
    LEVEL,
    Paired,
    bootstrap,
    detectable,
    holm,
    log_ratios,
    paired_t,
    seeds_needed,
    verdict,
)
from difftrain_utils.config.config import rename_fields
from difftrain_utils.config.scripts import script_of
from difftrain_utils.config.training import BEST_IS, SOURCES
from difftrain_utils.errors import LOAD_ERRORS, InputError, blame
from difftrain_utils.files import text_digest, write_file
from difftrain_utils.run.metrics import TIMES, read_metrics
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    PIPELINE,
    SAMPLES,
    VALIDATION,
    read_mapping,
    sound_files,
    step_file,
)
from difftrain_utils.terminal import printable

# These say where a run lies and what it is called, not what it is
IGNORED = tuple(f"train.{name}" for name in ("output_dir", "resume_from", "overwrite", "project", "run_name"))
SEEDS = ("train.seed", "train.seeds", *(f"train.seeds.{source}" for source in SOURCES))
NOT_SHOWN = {"step", "loss", "lr", "grad_norm", "skipped_rows", "flops", *TIMES}  # as final metrics
FINAL, BEST = "final val. loss", "best val. loss"
OBJECTIVE = ("model.prediction_type", "loss.", "timesteps.", "noise.", "scheduler.", "strategy.")  # of training
OBJECTIVE += ("few_step.", "preference.")
OBJECTIVE += ("masking.random_length_share",)  # the estimators of text estimate the same
JUDGED_BY = ("evaluation.", "preference.", "data.validation", "data.resolution", "data.image_interpolation")
JUDGED_BY += ("data.num_frames", "data.fps", "data.height", "data.width")
JUDGED_BY += ("data.waveform_length", "data.sampling_rate", "data.audio_channels", "data.seconds_of")
JUDGED_BY += ("data.peak", "data.mask_padding")
JUDGED_BY += ("noise.frame_correlation", "model.first_frame_probability")
JUDGED_BY += ("data.sequence_length", "data.packing", "data.tokenizer", "data.text_column", "data.prompt_column")
DENOISER = "base_model.sha256.denoiser"
ORDER = {
    FINAL: 0,
    BEST: 1,
    "shapes_right": 2,
    "shapes_preferred": 2,
    "scenes_right": 2,
    "moving_shapes_right": 2,
    "tones_right": 2,
    "valid": 2,
    "final train loss": 4,
    "samples/s": 5,
}  # of columns; other metrics are 3


class Kind(NamedTuple):
    """What runs of a script are about, in words."""

    level: str
    """What the bins of the validation loss differ in."""
    levels: str
    rows: str
    library: str
    """That its models are of."""
    judged_by: tuple[str, ...] = ()
    """The beginnings of fields that evaluations depend on, besides `JUDGED_BY`."""


KINDS = {
    "train_text_to_image.py": Kind("noise level", "noise levels", "images", "diffusers"),
    "train_few_step.py": Kind("noise level", "noise levels", "images", "diffusers"),
    "train_preference.py": Kind("noise level", "noise levels", "pairs", "diffusers"),
    "train_text_to_video.py": Kind("noise level", "noise levels", "videos", "diffusers", ("data.buckets",)),
    "train_text_to_audio.py": Kind("noise level", "noise levels", "sounds", "diffusers"),
    "train_text.py": Kind("share of masked tokens", "shares of masked tokens", "texts", "transformers"),
}


@dataclass
class Run:
    """What a run left: its config (dotted name to value), what it ran on and with, and its lines of metrics."""

    folder: Path
    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────
def load_runs(folders: list[Path]) -> list[Run]:
    check_folders(folders)
    return [load_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def check_folders(folders: list[Path]) -> None:
    """Raise InputError unless they are some folders, each given once."""
    if not folders:
        raise InputError("no RUN: give the output folder of at least one run")
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"{folder}: given twice")
        check_folder(folder)


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")


def short_names(folders: list[Path]) -> list[str]:
    """As many last parts of the paths as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    count = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return [str(Path(*p[-count:])) for p in parts]


def load_run(folder: Path, name: str) -> Run:
    check_folder(folder)
    for file in (CONFIG_FILE, MANIFEST_FILE, ENVIRONMENT_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder}: not the output folder of a run: it has no {file}")
    config = read_config(folder)
    manifest, env = read_mapping(folder / MANIFEST_FILE), read_mapping(folder / ENVIRONMENT_FILE)
    with blame(f"{folder / MANIFEST_FILE}: damaged", *LOAD_ERRORS):
        facts = facts_of(manifest, env)
    for field in (*SEEDS, "train.max_steps", "train.batch_size"):
        if not isinstance(config.get(field, 0), int):
            raise InputError(f"{folder / CONFIG_FILE}: {field}: must be a whole number, got {config[field]!r:.60}")
    return Run(folder, name, config, facts, load_metrics(folder / METRICS_FILE))


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config, dotted name to value, as this version calls the fields."""
    config = read_mapping(folder / CONFIG_FILE)
    rename_fields(config)  # of a run with an earlier version
    # a seed that is null is `train.seed`, as where it is not there, in a run with an earlier version
    return {name: value for name, value in flatten(config).items() if name not in SEEDS or value is not None}


def load_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; the run has not logged a step")
    metrics = read_metrics(path)
    if not metrics:
        raise InputError(f"{path}: empty; the run has not logged a step")
    return metrics


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}; lists stay values."""
    flat = {}
    for name, value in content.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def facts_of(manifest: dict[str, Any], env: dict[str, Any]) -> dict[str, Any]:
    """Beside the config, what decides a run's result: data, base model, code, versions and machine."""
    sections = {name: manifest.get(name) for name in ("data", "base_model", "git", "versions")}
    machine = {name: manifest.get(name) for name in ("device", "num_processes", "mixed_precision", "deterministic")}
    machine["stream"] = manifest.get("stream", 1)  # of samples: runs were of the first before it was noted
    machine |= {name: env.get(name) for name in ("cpu_threads", "cpu_capability")}
    resumed = {name for segment in manifest.get("segments", []) for name in segment.get("differs", {})}
    if resumed:
        machine["resumed with other"] = ", ".join(sorted(resumed))
    flat = flatten(sections) | machine
    if (denoiser := f"base_model.sha256.{flat.pop('base_model.denoiser', 'unet')}") in flat:  # of any family
        flat[DENOISER] = flat.pop(denoiser)
    # where data and model were found is in the config; here it counts what they were
    places = (".dataset", "base_model.name", "base_model.revision")
    return {name: value for name, value in flat.items() if not name.endswith(places)}


def kind_of(runs: list[Run]) -> Kind:
    """Of the first: those of several kinds are unfair to compare."""
    return KINDS[script_of(runs[0].config)]


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────
def series(run: Run, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a scalar metric."""
    return [(entry["step"], entry[name]) for entry in run.metrics if is_number(entry.get(name))]


def is_number(value: Any) -> bool:
    return type(value) in (int, float)  # of JSON; not true or false


def validation_losses(run: Run) -> list[tuple[int, float]]:
    """(step, loss) of the EMA weights if they were validated, else of the raw weights."""
    return series(run, "validation_loss_ema") or series(run, "validation_loss")


def validation_bins(run: Run) -> tuple[int | None, list[float]]:
    """The last step with losses per bin of noise levels, and these losses, from low to high noise."""
    for name in ("validation_loss_ema_bins", "validation_loss_bins"):
        for entry in reversed(run.metrics):
            if has_levels(entry, name):
                return entry["step"], entry[name]
    return None, []


def has_levels(entry: dict[str, Any], name: str) -> bool:
    """Whether a line of metrics has losses by noise level of this name."""
    return bool(entry.get(name)) and isinstance(entry[name], list) and all(map(is_number, entry[name]))


def steps_done(run: Run) -> int:
    """Optimizer steps: the last logged one, or max_steps if the run is complete and its last steps had no line."""
    last, planned = run.metrics[-1]["step"], run.config.get("train.max_steps") or 0
    complete = (run.folder / PIPELINE).is_dir() and 0 < planned - last < run.config.get("train.log_every", 1)
    return planned if complete else last


def summary(run: Run) -> dict[str, float]:
    """The numbers of a run's row by column; a column that the run has no values for is left out."""
    columns = {}
    if losses := validation_losses(run):
        columns |= {FINAL: losses[-1][1], BEST: min(filter(math.isfinite, dict(losses).values()), default=math.nan)}
    for name in {name for entry in run.metrics for name in entry} - NOT_SHOWN:
        if not name.startswith("validation_") and (values := series(run, name)):
            columns[name] = values[-1][1]
    if losses := series(run, "loss"):
        columns["final train loss"] = losses[-1][1]
    if speeds := series(run, "samples_per_second"):
        columns["samples/s"] = statistics.median(dict(speeds).values())
    return columns


def number(value: float, digits: int = 4) -> str:
    if not math.isfinite(value) or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


# ── Groups of seeds ──────────────────────────────────────────────────────────────────────────────────────────
def from_scratch(run: Run) -> bool:
    name = str(run.config.get("model.pretrained_model_name_or_path"))
    return run.config.get("model.train_from_scratch") is True or name.startswith("builtin:")


def seeds_of(run: Run) -> tuple[int | None, ...]:
    """Those of `SOURCES`."""
    seed = run.config.get("train.seed")
    return tuple(run.config.get(f"train.seeds.{source}", seed) for source in SOURCES)


def sources_that_vary(runs: list[Run]) -> list[str]:
    """What has not the same seed in all runs."""
    return [
        source
        for source, seeds in zip(SOURCES, zip(*map(seeds_of, runs), strict=True), strict=True)
        if len(set(seeds)) > 1
    ]


def repeated_seeds(runs: list[Run]) -> str | None:
    """A source that varies, but has not another seed in each of the runs: what they tell is not independent."""
    sources = zip(SOURCES, zip(*map(seeds_of, runs), strict=True), strict=True)
    return next((source for source, seeds in sources if 1 < len(set(seeds)) < len(seeds)), None)


def describe_seeds(runs: list[Run]) -> str:
    """How many, and of what if not of all: `3 seeds of weights`."""
    sources = sources_that_vary(runs)
    return f"{len(runs)} seeds" + (f" of {' and '.join(sources)}" if 0 < len(sources) < len(SOURCES) else "")


def settings_of(runs: list[Run], at_one_step: bool = True) -> list[list[Run]]:
    """Runs that are equal in all but their seeds, together, if they are at the same step (unless not `at_one_step`); of
    repeats of the same seeds only the first."""
    settings: dict[str, dict[Any, Run]] = {}
    for run in runs:
        config = {name: value for name, value in run.config.items() if name not in (*IGNORED, *SEEDS)}
        facts = {name: v for name, v in run.facts.items() if not (name == DENOISER and from_scratch(run))}
        key = as_text([config, facts, steps_done(run) if at_one_step else None])
        settings.setdefault(key, {}).setdefault(seeds_of(run), run)
    return [list(by_seed.values()) for by_seed in settings.values()]


def group_names(settings: list[list[Run]]) -> dict[str, str]:
    """What to call the group of a run, by the run's name: how the names of its runs begin (huber-0 and huber-1 are
    `huber`), or group A, B, … where they have no beginning of their own; a run alone has none."""
    groups = [[run.name for run in runs] for runs in settings if len(runs) > 1]
    beginnings = [re.sub(r"[-_. ]+(seed)?[-_. ]*\d*$", "", common_beginning(names)) for names in groups]
    found = {}
    for i, (names, beginning) in enumerate(zip(groups, beginnings, strict=True)):
        own = beginning and beginnings.count(beginning) == 1
        found |= dict.fromkeys(names, beginning if own else f"group {i + 1 if i > 25 else chr(ord('A') + i)}")
    return found


def common_beginning(texts: list[str]) -> str:
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def mean_and_sd(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (n - 1; nan for one run) of the runs' values; None unless each has one."""
    if None in values:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


# ── The tables ───────────────────────────────────────────────────────────────────────────────────────────────
def summary_table(runs: list[Run]) -> list[list[str]]:
    """Header, a row for each run, and a row of means for each group of seeds."""
    settings, summaries = settings_of(runs), [summary(run) for run in runs]
    groups = group_names(settings)
    columns = sorted({name for s in summaries for name in s}, key=lambda name: (ORDER.get(name, 3), name))
    rows = [["run", "steps", *columns]]
    for run, values in zip(runs, summaries, strict=True):
        cells = {name: number(value) for name, value in values.items()}
        if BEST in values and math.isfinite(values[BEST]):
            cells[BEST] += f" @ {next(step for step, loss in validation_losses(run) if loss == values[BEST])}"
        done, planned = steps_done(run), run.config.get("train.max_steps") or 0
        steps = f"{done} of {planned}" if done < planned else f"{done}"
        group = groups.get(run.name, "")
        name = run.name if run.name.startswith(group) else f"{run.name} ({group})"
        rows.append([name, steps, *(cells.get(column, "–") for column in columns)])
    for group in (runs for runs in settings if len(runs) > 1):
        of_group = [values for run, values in zip(runs, summaries, strict=True) if run in group]
        spreads = [mean_and_sd([values.get(column) for values in of_group]) for column in columns]
        name = f"{groups[group[0].name]}: mean ± sd over {describe_seeds(group)}"
        cells = [f"{number(s[0])} ± {number(s[1], 2)}" if s else "–" for s in spreads]
        rows.append([name, f"{steps_done(group[0])}", *cells])
    return rows


def bins_table(runs: list[Run]) -> list[list[str]]:
    """Validation loss per bin of noise levels at the last step that has it; a header alone if no run has it."""
    settings, found = settings_of(runs), [(run.name, *validation_bins(run)) for run in runs]
    groups, count = group_names(settings), max(len(losses) for _, _, losses in found)
    for group in (runs for runs in settings if len(runs) > 1):
        steps, losses = zip(*map(validation_bins, group), strict=True)
        if len(set(steps)) == 1 and len(set(map(len, losses))) == 1:
            means = [statistics.fmean(values) for values in zip(*losses, strict=True)]
            found.append((f"{groups[group[0].name]}: mean over {describe_seeds(group)}", steps[0], means))
    rows = [["run", "step", *(f"bin {i + 1}" for i in range(count))]]
    for name, step, losses in found:
        if losses:
            rows.append([name, str(step), *map(number, losses), *["–"] * (count - len(losses))])
    return rows


# ── What differs ─────────────────────────────────────────────────────────────────────────────────────────────
def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def brief(text: str) -> str:
    """A value in one line: of a digest its first digits, of a long text its start and its digest."""
    if re.fullmatch("[0-9a-f]{40,64}", text):
        return text[:12]
    line = " ".join(text.split())
    if len(line) <= 48 and line == text:
        return text or "(empty)"
    return f"{line[:36]}… [sha256 {text_digest(text)[:8]}]"


def differing(tables: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The names whose values are not the same in all tables, and each table's value as text."""
    names = dict.fromkeys(name for table in tables for name in table if name not in IGNORED)
    rows = {name: [as_text(table[name]) if name in table else "absent" for table in tables] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def what_differs(runs: list[Run]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The config fields, and the facts outside of the config, that are not the same in all runs."""
    facts = differing([run.facts for run in runs])
    if DENOISER in facts and denoiser_follows_seed(runs):
        del facts[DENOISER]
    return differing([run.config for run in runs]), facts


def denoiser_follows_seed(runs: list[Run]) -> bool:
    """Whether different denoisers are just random weights of one model, drawn from different seeds."""
    names = {as_text(run.config.get("model.pretrained_model_name_or_path")) for run in runs}
    drawn = {(seeds_of(run)[0], run.facts.get(DENOISER)) for run in runs}
    one_a_seed = len(drawn) == len({seed for seed, _ in drawn})
    return len(names) == 1 and one_a_seed and all(from_scratch(run) for run in runs)


def headline(runs: list[Run]) -> str:
    config, facts = what_differs(runs)
    if not facts:
        return f"The runs differ in: {', '.join(config)}" if config else "The runs differ in nothing that is recorded."
    start = f"differ in: {', '.join(config)}; and outside" if config else "have the same config, but differ outside"
    return f"The runs {start} the config in: {', '.join(facts)}"


def by_value(runs: list[Run], values: list[str]) -> str:
    """E.g. `mse (a, b); huber (c)`, or where a group of seeds has one value `mse (mse-*); huber (huber-*)`."""
    groups = group_names(settings_of(runs))
    values_of_group = {group: set() for group in groups.values()}
    for run, value in zip(runs, values, strict=True):
        values_of_group.get(groups.get(run.name), set()).add(value)
    names = {}
    for run, value in zip(runs, values, strict=True):
        group = groups.get(run.name)
        whole = group is not None and len(values_of_group[group]) == 1 and run.name.startswith(group)
        names.setdefault(value, {})[f"{group}-*" if whole else run.name] = None
    return "; ".join(f"{brief(value)} ({', '.join(of)})" for value, of in names.items())


def unfair(runs: list[Run]) -> list[str]:
    """What makes a better result of one run say nothing about the setting that was to be compared."""
    config, facts = what_differs(runs)
    kind = kind_of(runs)
    library, judged_by = kind.library, JUDGED_BY + kind.judged_by
    code, libraries = ("git", "git.commit", "git.diff", "resumed with other"), ("versions.torch", f"versions.{library}")
    found = {
        "data fingerprint": [name for name in facts if name.split(".")[0] == "data"],
        "base model": [name for name in facts if name.split(".")[0] == "base_model"],
        "code": [name for name in facts if name in code],
        f"versions of torch or {library}": [name for name in facts if name in libraries],
        "streams of samples, and so triples to validate on": [name for name in facts if name == "stream"],
        "validation settings": [name for name in config if name.startswith(judged_by)],
    }
    warnings = [f"unfair: different {what} ({', '.join(names)})" for what, names in found.items() if names]
    validated = [str(losses[-1][0]) for run in runs if (losses := validation_losses(run))]
    if len(set(validated)) > 1:
        warnings.append(f"unfair: validated at different steps: {', '.join(sorted(set(validated), key=int))}")
    seen = [str(steps_done(run) * (run.config.get("train.batch_size") or 0)) for run in runs]
    if len(set(seen)) > 1:
        warnings.append(f"unfair: different numbers of samples seen (steps × batch size): {by_value(runs, seen)}")
    return warnings


def notes(runs: list[Run]) -> list[str]:
    """What to know before reading the table."""
    counted = [run.name for setting in settings_of(runs) for run in setting]
    raw = [run.name for run in runs if validation_losses(run) and not series(run, "validation_loss_ema")]
    found = [f"{run.name} repeats a seed and is not counted twice" for run in runs if run.name not in counted]
    if raw:
        of = "" if len(raw) == sum(BEST in summary(run) for run in runs) else f" of {', '.join(raw)}"
        found.append(f"the validation loss{of} is that of the raw weights, not the EMA weights")
    for run in runs:
        if (losses := validation_losses(run)) and losses[-1][0] != steps_done(run):
            found.append(f"{run.name} was last validated at step {losses[-1][0]}, not at its last step")
        if skipped := sum(count for _, count in series(run, "skipped_rows")):
            found.append(f"{run.name} took {skipped} samples from other rows than were due, which could not be read")
    if any(name.startswith(OBJECTIVE) for name in what_differs(runs)[0]):
        found.append("the training losses are of different objectives: do not compare them")
    if len(runs) > 1 and not any(run.facts.get("git.commit") for run in runs):
        found.append("no run recorded a git commit: whether the code was the same is unknown")
    return [f"note: {note}" for note in found]


# ── Against a baseline ───────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Compared:
    """A setting and the baseline: the differences of each seed in common, by noise level, and the test of their means
    over the levels; without it, why there is none. None: there is nothing to compare. `p` is corrected by Holm."""

    differences: list[list[float]] | None
    paired: Paired | None = None
    why_not: str = ""
    p: float | None = None
    verdict: str = ""


@dataclass
class Contest:
    """What is to be said of the settings that are compared with a baseline: in words, as a table with a row for each,
    as a table of noise levels (or none), in words again, and in numbers."""

    introduction: str
    rows: list[list[str]]
    bins: list[list[str]]
    sentences: list[str]
    results: list[Compared]


class Metric(NamedTuple):
    """What is compared instead of the validation losses: a name in metrics.jsonl, and whether its best value is the
    `lowest` or the `highest`."""

    name: str
    best: str


def metric_of(name: str, field: str) -> Metric:
    """Raises InputError about `field` for a metric that is not known."""
    if name not in BEST_IS:
        raise InputError(f"{field}: must be one of {', '.join(BEST_IS)}, got {name!r}")
    return Metric(name, BEST_IS[name])


def seeds_in_common(setting: list[Run], base: list[Run]) -> list[tuple[Run, Run]]:
    """The runs of the same seeds that both have, in their order."""
    own, other = ({seeds_of(run): run for run in runs} for runs in (setting, base))
    return [(own[seeds], other[seeds]) for seeds in sorted(s for s in own.keys() & other.keys() if None not in s)]


def choose_baseline(settings: list[list[Run]], names: list[str], name: str | None) -> int:
    """The setting of this name, or with a run of this name; without one the first."""
    if name is None:
        return 0
    for i, (called, runs) in enumerate(zip(names, settings, strict=True)):
        if name in (called, *(run.name for run in runs)):
            return i
    raise InputError(f"--baseline {name}: no such setting or run; there is {', '.join(names)}")


def losses_by_level(run: Run) -> list[float]:
    """The last validation losses by noise level; of a run without them, the one validation loss."""
    return validation_bins(run)[1] or [loss for _, loss in validation_losses(run)[-1:]]


def differences(own: Run, other: Run, metric: Metric | None) -> list[float]:
    """Of two runs, below 0 where the first is better: of the logarithms of the validation losses, by noise level, or of
    the metric's last values. Raises ValueError if there are none to compare."""
    if metric is None:
        return log_ratios(losses_by_level(own), losses_by_level(other))
    last = [series(run, metric.name)[-1:] for run in (own, other)]
    if not all(last):
        raise ValueError(f"no {metric.name}")
    (step, value), (other_step, other_value) = (found[0] for found in last)
    if step != other_step:
        raise ValueError(f"{metric.name} of step {step}, and the baseline's of {other_step}")
    if not math.isfinite(value) or not math.isfinite(other_value):
        raise ValueError(f"{metric.name} is not finite")
    return [value - other_value if metric.best == "lowest" else other_value - value]


def compared(pairs: list[tuple[Run, Run]], metric: Metric | None = None) -> Compared:
    """A setting's runs, each with that of the baseline to compare it with."""
    try:
        found = [differences(own, other, metric) for own, other in pairs]
    except ValueError as error:
        return Compared(None, why_not=str(error))
    if len(found) < 2:
        return Compared(found, why_not="one seed has no spread" if found else "no seed in common with the baseline")
    for runs in zip(*pairs, strict=True):
        if repeated := repeated_seeds(list(runs)):
            why_not = f"its runs share seeds of {repeated}, and so do not count as {len(pairs)}"
            return Compared(found, why_not=why_not)
    return Compared(found, paired_t([statistics.fmean(levels) for levels in found]))


def contest(
    runs: list[Run], baseline: str | None = None, looks: int = 1, metric: Metric | None = None
) -> Contest | None:
    """Each setting against the baseline, paired by seed; None if there is but one setting. See `held_against`."""
    settings = settings_of(runs)
    if len(settings) < 2:
        return None
    groups = group_names(settings)
    names = [groups.get(setting[0].name, setting[0].name) for setting in settings]
    chosen = choose_baseline(settings, names, baseline)
    base, base_name = settings.pop(chosen), names.pop(chosen)
    return held_against(base, base_name, dict(zip(names, settings, strict=True)), looks, metric)


def held_against(
    base: list[Run],
    base_name: str,
    settings: dict[str, list[Run]],
    looks: int = 1,
    metric: Metric | None = None,
    pair: Callable[[list[Run], list[Run]], list[tuple[Run, Run]]] = seeds_in_common,
) -> Contest:
    """The settings, by their names, against the baseline, run by run as `pair` puts them together.

    Without a `metric`, a seed's difference is the mean over the noise levels of the logarithm of the ratio of the two
    validation losses: so each level counts the same, where in the mean loss one level may be nine tenths of the sum.
    """
    pairs = {name: pair(setting, base) for name, setting in settings.items()}
    results = {name: compared(of_setting, metric) for name, of_setting in pairs.items()}
    reasons = {
        name: "; ".join(line.removeprefix("unfair: ") for line in unfair([*base, *setting]))
        for name, setting in settings.items()
    }
    # the settings of which something can be said share the 5 %
    tested = [result for name, result in results.items() if result.paired and not reasons[name]]
    for result, p in zip(tested, holm([result.paired.p for result in tested]), strict=True):
        result.p = p
    kind, sign = kind_of(base), -1 if metric and metric.best == "highest" else 1

    def shown(*values: float) -> str:
        """A difference, or the ends of an interval, as larger or smaller rather than worse or better."""
        return " to ".join(percent(v) if metric is None else f"{v:+.4g}" for v in sorted(sign * v for v in values))

    rows = [["setting", "seeds", "difference", "95 % interval", f"over {kind.rows}, too", "p (Holm)", "verdict"]]
    bins, sentences = [], []
    for name, result in results.items():
        found, paired = result.differences, result.paired
        unfairness = f"unfair: {reasons[name]}" if reasons[name] else ""
        if paired is None:
            count = "–" if found is None else str(len(found))
            difference = shown(statistics.fmean(found[0])) if found else "–"
            result.verdict = unfairness or f"no verdict: {result.why_not}"
            rows.append([name, count, difference, "–", "–", "–", result.verdict])
            continue
        resampled = resample(pairs[name]) if metric is None else None
        result.verdict = unfairness or verdict(paired, result.p, looks)
        cells = [shown(paired.mean), shown(paired.low, paired.high), interval(*resampled) if resampled else "–"]
        rows.append([name, str(paired.n), *cells, "–" if result.p is None else f"{result.p:.2g}", result.verdict])
        if len(set(map(len, found))) == 1 and len(found[0]) > 1:
            bins.append([name, *(percent(statistics.fmean(level)) for level in zip(*found, strict=True))])
        own = [run for run, _ in pairs[name]]
        if fixed := [source for source in SOURCES if source not in sources_that_vary(own)]:
            sentences.append(f"{name}: holds for these seeds of {' and '.join(fixed)}, which its runs share.")
        if result.verdict == "not distinguishable":
            sentences.append(f"{name}: {in_seeds(paired, LEVEL / looks / len(tested), shown)}.")
    header = ["setting", *(f"bin {i + 1}" for i in range(max((len(row) - 1 for row in bins), default=0)))]
    said = introduction(base_name, looks, kind, metric)
    return Contest(said, rows, [header, *bins] if bins else [], sentences, list(results.values()))


def in_seeds(paired: Paired, level: float, shown: Callable[[float], str]) -> str:
    """What gap so many seeds detect at a p of `level`, and how many seeds the gap as it was seen needs."""
    detected = shown(detectable(paired.sd, paired.n, level)).removeprefix("+").removeprefix("-")
    needed = seeds_needed(paired.sd, paired.mean, level)
    text = f"{paired.n} seeds detect a gap of {detected} in about four of five cases"
    if not paired.mean:
        return text
    return f"{text}; for one as seen here, {'more than 1000' if needed is None else needed}"


def resample(pairs: list[tuple[Run, Run]]) -> tuple[float, float] | None:
    """The bootstrap's interval; None where a run has not kept the losses of its last step, or others have other
    triples."""
    found = [triple_losses(run) for runs in zip(*pairs, strict=True) for run in runs]  # the setting's, then the other's
    if not all(found):
        return None
    images, bins = found[0]["image"], found[0]["bin"]
    if not all(np.array_equal(part["image"], images) and np.array_equal(part["bin"], bins) for part in found):
        return None
    losses = np.stack([part["loss"] for part in found]).astype(np.float64)
    return bootstrap(losses[: len(pairs)], losses[len(pairs) :], images, bins)


def triple_losses(run: Run) -> dict[str, np.ndarray] | None:
    """The loss, the image and the bin of each triple of the last validation; None if they were not kept."""
    step = validation_losses(run)[-1][0]
    path = step_file(run.folder, VALIDATION, step, ".safetensors")
    if not path.is_file():
        return None
    with blame(str(path), *LOAD_ERRORS):
        tensors = load_file(path)
        name = "validation_loss_ema" if "validation_loss_ema" in tensors else "validation_loss"
        return {"loss": tensors[name], "image": tensors["image"], "bin": tensors["bin"]}


def percent(log_ratio: float) -> str:
    """Of a logarithm of a ratio: +1.2 % is larger by so much."""
    if log_ratio > 100:  # one that diverged
        return f"e^{log_ratio:.3g} times"
    return f"{math.expm1(log_ratio):+.2%}".replace("%", " %")


def interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def introduction(baseline: str, looks: int, kind: Kind, metric: Metric | None) -> str:
    if metric is None:
        what = f"the validation loss is lower (-) or higher (+), as the geometric mean over the {kind.levels}, each of "
        what += "which counts the same"
    else:
        what = f"{metric.name} is lower (-) or higher (+), of which the {metric.best} is best"
    text = (
        f"Against {baseline}, paired by seed: by how much {what}; its 95 % t interval; p after Holm over "
        f"the settings, of which at most {LEVEL / looks:.2g} is called a difference."
    )
    if looks > 1:
        return f"{text} One of {looks} looks that were planned."
    return f"{text} It holds for a number of seeds that was fixed beforehand (else --looks)."


# ── The report as text ───────────────────────────────────────────────────────────────────────────────────────
def text_table(rows: list[list[str]], width: int = 120) -> str:
    """Aligned columns; those beyond `width` characters follow underneath, after the first column once more."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(widths[j] + 2 for j in [*blocks[-1], i]) > width:
            blocks.append([])
        blocks[-1].append(i)
    lines = [[row[0].ljust(widths[0]) + "".join(f"  {row[i]:>{widths[i]}}" for i in b) for row in rows] for b in blocks]
    return "\n\n".join("\n".join(block) for block in lines)


def short_verdicts(rows: list[list[str]], length: int = 40) -> tuple[list[list[str]], list[str]]:
    """The table of verdicts, of which those that are longer have their first word there alone, and all of them, by
    setting, in lines of their own."""
    shown, reasons = [], []
    for setting, *cells, said in rows:
        if len(said) > length:
            reasons.append(textwrap.fill(f"{setting}: {said}", 120, subsequent_indent="  "))
            said = said.split(":")[0]
        shown.append([setting, *cells, said])
    return shown, reasons


def text_report(runs: list[Run], found: Contest | None) -> str:
    bins, level = bins_table(runs), kind_of(runs).level
    parts = [text_table(summary_table(runs)), "\n".join(notes(runs))]
    if found:
        rows, reasons = short_verdicts(found.rows)
        parts += [textwrap.fill(found.introduction, 120), text_table(rows), "\n".join([*reasons, *found.sentences])]
        parts += [f"The difference by {level}:\n" + text_table(found.bins)] if found.bins else []
    elif len(runs) > 1:
        parts.append("All runs are one setting: nothing to compare.")
    if len(bins) > 1:
        parts.append(f"Last validation loss by {level}, from low (bin 1) to high:\n" + text_table(bins))
    if len(runs) > 1:
        rows = [f"  {name}: {by_value(runs, row)}" for table in what_differs(runs) for name, row in table.items()]
        parts.append("\n".join([headline(runs), *rows, *unfair(runs)]))
    return "\n\n".join(part for part in parts if part)


# ── The report as HTML ───────────────────────────────────────────────────────────────────────────────────────
def html_report(runs: list[Run], found: Contest | None) -> str:
    """The same, with curves and samples, as one file that needs no other."""
    title, bins = f"Comparison of {len(runs)} runs" if len(runs) > 1 else runs[0].name, bins_table(runs)
    parts = [html.table(summary_table(runs), "numbers"), *map(html.paragraph, notes(runs))]
    if found:
        parts += [html.heading("Verdicts"), html.paragraph(found.introduction), html.table(found.rows, "values")]
        parts += map(html.paragraph, found.sentences)
        if found.bins:
            parts += [html.heading(f"The difference by {kind_of(runs).level}"), html.table(found.bins, "numbers")]
    if len(runs) > 1:
        fields = [[name, *map(brief, row)] for rows in what_differs(runs) for name, row in rows.items()]
        parts += [html.heading("Differences") + html.paragraph(headline(runs))]
        parts += [html.paragraph(warning, "unfair") for warning in unfair(runs)]
        parts += [html.table([["", *(run.name for run in runs)], *fields], "values")] if fields else []
    parts += [charts(runs), html.table(bins, "numbers") if len(bins) > 1 else ""]
    parts += [html.heading("Last samples") + '<div class="samples">', *map(last_sample, runs), "</div>"]
    return html.page(title, parts)


def charts(runs: list[Run]) -> str:
    training = [(run.name, html.smooth(series(run, "loss")), series(run, "loss")) for run in runs]
    validation = [(run.name, validation_losses(run), []) for run in runs]
    bins = [(run.name, list(enumerate(validation_bins(run)[1], 1)), []) for run in runs]
    drawn = [html.chart("Training loss (running mean; faint: as logged)", "step", training, markers=False)]
    drawn += [html.chart("Validation loss", "step", validation)]
    level = kind_of(runs).level
    drawn += [html.chart(f"Last validation loss by {level}", f"bin, from low to high {level}", bins)]
    return "\n".join(drawn)


def samples_of(run: Run) -> dict[int, Path]:
    """The grids or pages of samples by step."""
    paths = [path for kind in ("png", "txt", "webp") for path in (run.folder / SAMPLES).glob(f"step-*.{kind}")]
    return dict(sorted((int(path.stem[5:]), path) for path in paths if path.stem[5:].isdecimal()))


def sounds_of(run: Run, samples: Path) -> list[tuple[str, Path]]:
    """The sounds of a grid of spectrograms, with their prompts."""
    files, prompts = sound_files(samples), run.config.get("evaluation.prompts")
    labels = prompts if isinstance(prompts, list) and len(prompts) == len(files) else [path.name for path in files]
    return list(zip(map(str, labels), files, strict=True))


def last_sample(run: Run) -> str:
    """The newest samples as a figure."""
    found = samples_of(run)
    newest = max(found, default=None)
    caption = f"{run.name}, " + ("no samples" if newest is None else f"step {newest}")
    return html.figure(caption, found.get(newest), sounds_of(run, found[newest]) if found else [])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain compare", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="output folder of a run")
    parser.add_argument("--output", metavar="REPORT.html", type=Path, help="also write one self-contained HTML file")
    parser.add_argument("--baseline", metavar="NAME", help="setting, or run of it, that others are compared with")
    parser.add_argument("--metric", metavar="NAME", help="compare its last values instead of the validation losses")
    parser.add_argument("--looks", type=int, default=1, help="how often you will have looked by when all seeds are run")
    args = parser.parse_args(argv)
    if args.looks < 1:
        raise InputError(f"--looks: must be at least 1, got {args.looks}")
    if args.output and args.output.suffix != ".html":
        raise InputError(f"--output {args.output}: must end in .html")
    metric = args.metric and metric_of(args.metric, "--metric")
    runs = load_runs(args.runs)
    found = contest(runs, args.baseline, args.looks, metric)
    if args.baseline and not found:
        raise InputError(f"--baseline {args.baseline}: all runs are one setting")
    print(printable(text_report(runs, found)))
    if args.output:
        with blame(f"--output {args.output}", OSError):
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_file(args.output, html_report(runs, found))
        print(f"\n{args.output} shows it with curves and samples")
