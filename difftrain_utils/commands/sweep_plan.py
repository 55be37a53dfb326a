"""The plan of a sweep: strategies × learning rates × seeds, and the runs that it takes."""

import dataclasses
import difflib
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from difftrain_utils.commands.compare import Metric, metric_of
from difftrain_utils.config.command_line import StrictLoader, parse_config
from difftrain_utils.config.fit import check_metric
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.config.training import SOURCES
from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import file_digest, text_digest, write_file
from difftrain_utils.run.run_folder import MANIFEST_FILE

PLAN_FILE = "plan.yaml"  # in the sweep's folder: the plan that its runs are of
LR, ARGUMENTS = "optimizer.init_args.lr", "optimizer.init_args"
OURS = ("train.seed", "train.seeds", "train.output_dir", "train.resume_from", "train.overwrite")
OF_STRATEGY = ("config", "script", "learning_rates")  # beside its fields, which have a dot
CONTROL, TUNE, COMPARE, VARIANCE = "control", "tune", "compare", "variance"


class PlannedRun(NamedTuple):
    """A run: which strategy at which learning rate (None: the one that tuning chooses), the fields that make its seeds,
    and its folder in the sweep's."""

    stage: str
    strategy: str
    rate: float | None
    seeds: dict[str, int]
    folder: Path


@dataclass
class Plan:
    """What a plan's YAML holds. Each strategy is {field: value} on top of `config` and `fields`, and may have besides
    `config` (more files), `script` and `learning_rates` of its own."""

    config: str | list[str]
    """The file, or files, of all runs, as `--config` takes them."""
    strategies: dict[str, dict[str, Any]]
    seeds: list[int]
    """Those of the runs that are compared."""
    output_dir: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of all runs, by their dotted names; the budget is `train.max_steps` among them."""
    script: str | None = None
    """The training script; null: the one whose fields the config has."""
    baseline: str | None = None
    """The strategy that others are compared with; null: the first."""
    learning_rates: list[float] = field(default_factory=list)
    """Those that each strategy is tried at; of one, or none (the config's), there is nothing to tune."""
    tuning_seeds: list[int] = field(default_factory=list)
    """The seeds of these tries, which are none of those that are compared."""
    metric: str | None = None
    """What decides, in tuning and comparing; null: the validation losses, as `difftrain compare` takes them."""
    control_seeds: list[int] = field(default_factory=list)
    """Seeds to run the baseline with once more, as a control in which nothing differs (A/A); as many as `seeds`."""
    variance_seeds: list[int] = field(default_factory=list)
    """Seeds to run the baseline with, of weights, data and noise alone in turn: how much of its spread each makes."""
    looks: int = 1
    """How often one will have looked at the verdicts by when all is run."""
    ledger: str = "experiments.jsonl"
    """The file that a finished comparison is a line of."""

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)
        self.learning_rates = numbers(self.learning_rates, "learning_rates")
        for name, strategy in self.strategies.items():
            if "learning_rates" in strategy:
                strategy["learning_rates"] = numbers(strategy["learning_rates"], f"strategies.{name}.learning_rates")
        self.baseline = self.baseline or next(iter(self.strategies))

    # ── What it asks for ─────────────────────────────────────────────────────────────────────────────────────
    @property
    def what_decides(self) -> Metric | None:
        return None if self.metric is None else metric_of(self.metric, "metric")

    @property
    def measure(self) -> str:
        """What decides, in words."""
        return self.metric or "geometric mean of the validation losses"

    def rates_of(self, strategy: str) -> list[float]:
        """Those that a strategy is tried at, from low to high."""
        return sorted(self.strategies[strategy].get("learning_rates", self.learning_rates))

    def is_tuned(self, strategy: str) -> bool:
        return len(self.rates_of(strategy)) > 1

    def runs(self) -> list[PlannedRun]:
        """Those that tune, and then the others."""
        runs = [
            PlannedRun(TUNE, name, rate, {"train.seed": seed}, self._folder(TUNE, name, f"lr-{rate:g}", f"seed-{seed}"))
            for name in self.strategies
            if self.is_tuned(name)
            for rate in self.rates_of(name)
            for seed in self.tuning_seeds
        ]
        for seed in self.seeds:
            runs += [self._compared(COMPARE, name, name, seed) for name in self.strategies]
        runs += [self._compared(COMPARE, self.baseline, CONTROL, seed) for seed in self.control_seeds]
        for source in SOURCES:
            for seed in self.variance_seeds:
                seeds = {"train.seed": self.seeds[0], f"train.seeds.{source}": seed}
                folder = self._folder(VARIANCE, source, f"seed-{seed}")
                runs.append(PlannedRun(VARIANCE, self.baseline, None, seeds, folder))
        return runs

    def _compared(self, stage: str, strategy: str, called: str, seed: int) -> PlannedRun:
        return PlannedRun(stage, strategy, None, {"train.seed": seed}, self._folder(stage, called, f"seed-{seed}"))

    def _folder(self, *parts: str) -> Path:
        return Path(self.output_dir, *parts)

    def script_of(self, strategy: str) -> str:
        given = self.strategies[strategy].get("script") or self.script
        return given or script_for(self.arguments(strategy, None))

    def arguments(self, strategy: str, rate: float | None) -> list[str]:
        """The options of a strategy at a learning rate (None: the config's)."""
        own = self.strategies[strategy]
        fields = self.fields | {name: value for name, value in own.items() if name not in OF_STRATEGY}
        if rate is not None and ARGUMENTS in fields:
            fields[ARGUMENTS] = fields[ARGUMENTS] | {"lr": rate}
        elif rate is not None:
            fields[LR] = rate
        files = [*files_of(self.config), *files_of(own.get("config"))]
        argv = [part for file in files for part in ("--config", file)]
        return argv + [part for name, value in fields.items() for part in (f"--{name}", as_argument(value))]

    def options(self, run: PlannedRun, rate: float | None) -> list[str]:
        """What the script is told for a run, which goes on where it was stopped."""
        fields = {**run.seeds, "train.output_dir": str(run.folder), "train.resume_from": "latest"}
        return self.arguments(run.strategy, rate) + [p for name, v in fields.items() for p in (f"--{name}", str(v))]

    # ── Whether it can be had ────────────────────────────────────────────────────────────────────────────────
    def check(self) -> None:
        """Raise InputError for the first thing in it that is not allowed."""
        for name in ("config", "output_dir", "ledger"):
            require(bool(getattr(self, name)), name, "must not be empty")
        require("://" not in self.output_dir, "output_dir", f"must be a folder of this machine, got {self.output_dir}")
        ledger = Path(self.ledger)
        can_be_file = not ledger.is_dir() and not any(folder.is_file() for folder in ledger.parents)
        require(can_be_file, "ledger", f"must be a file, in a folder, got {self.ledger}")
        require(self.looks >= 1, "looks", f"must be at least 1, got {self.looks}")
        self._check_seeds()
        for name in self.strategies:
            is_name = name.replace("_", "").replace("-", "").isalnum() and name != CONTROL
            require(is_name, f"strategies.{name}", f"must be called by letters, digits, - and _, and not {CONTROL}")
        known = ", ".join(self.strategies)
        require(self.baseline in self.strategies, "baseline", f"must be one of {known}, got {self.baseline!r}")
        if self.metric is not None:
            metric_of(self.metric, "metric")
        for strategy in self.strategies:
            self._check_strategy(strategy)
        is_tuned = any(map(self.is_tuned, self.strategies))
        require(is_tuned or not self.tuning_seeds, "tuning_seeds", "without effect: no strategy has rates to tune")

    def _check_seeds(self) -> None:
        groups = {name: getattr(self, name) for name in ("tuning_seeds", "seeds", "control_seeds", "variance_seeds")}
        for name, seeds in groups.items():
            are_seeds = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
            require(are_seeds, name, f"must be whole numbers from 0 to 2^63 - 1, got {seeds!r:.80}")
            require(len(set(seeds)) == len(seeds), name, f"each only once, got {seeds}")
        require(len(self.seeds) > 0, "seeds", "must not be empty")
        for name in ("seeds", "control_seeds", "variance_seeds"):
            both = sorted(set(self.tuning_seeds) & set(groups[name]))
            rule = f"a rate that was chosen on a seed looks better on it than it is: no seed may be in {name}, too"
            require(not both, "tuning_seeds", f"{rule}, got {both}")
        both = sorted(set(self.seeds) & {*self.control_seeds, *self.variance_seeds})
        require(not both, "seeds", f"none may be in control_seeds or variance_seeds, too, got {both}")
        fits = len(self.control_seeds) in (0, len(self.seeds))
        require(fits, "control_seeds", f"must be as many as seeds, {len(self.seeds)}, got {len(self.control_seeds)}")

    def _check_strategy(self, name: str) -> None:
        own, where = self.strategies[name], f"strategies.{name}"
        for part, fields in (("fields", self.fields), (where, own)):
            for given in fields:
                if part != "fields" and given in OF_STRATEGY:
                    continue
                hint = f", or {', '.join(OF_STRATEGY)}" if part != "fields" else ""
                is_dotted = isinstance(given, str) and "." in given
                require(is_dotted, part, f"must have dotted names of fields{hint}, got {given!r}")
                with blame(f"{part}.{given}", TypeError):  # of a date, such as YAML has
                    as_argument(fields[given])
                if given == ARGUMENTS:
                    arguments = fields[given]
                    are_named = isinstance(arguments, dict)
                    require(are_named, f"{part}.{given}", f"must be {{argument: value}}, got {arguments!r:.60}")
                    is_ours = "lr" in arguments and self.rates_of(name)
                    require(not is_ours, f"{part}.{given}.lr", "learning_rates has it")
                taken = given.startswith(OURS) or given == LR
                instead = "learning_rates has it" if given == LR else "the sweep sets it"
                require(not (taken and (given != LR or self.rates_of(name))), f"{part}.{given}", instead)
        rates = self.rates_of(name)
        are_rates = all(rate > 0 for rate in rates) and len({f"{rate:g}" for rate in rates}) == len(rates)
        require(are_rates, f"{where}: learning_rates", f"must be different numbers above 0, got {rates}")
        require(not (self.is_tuned(name) and not self.tuning_seeds), "tuning_seeds", f"{name} has rates to tune: empty")
        script = self.script_of(name)
        require(Path(script).is_file(), f"{where}: script", f"no such file in this folder: {script}")
        if Path(script).name in SCRIPTS:  # a fork may have fields of its own, which it checks itself
            run = self._compared(COMPARE, name, name, self.seeds[0])
            for rate in rates or [None]:
                with within(where):
                    config = checked_config(Path(script).name, tuple(self.options(run, rate)))
                    config.check_split(num_processes=1)
                    check_metric(config, self.metric or "validation_loss", require, "metric")

    # ── What its runs are of ─────────────────────────────────────────────────────────────────────────────────
    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """The plan and what its files are, by their SHA-256."""
        content = dataclasses.asdict(self)
        del content["ledger"]
        return content | {"files": {path: file_digest(Path(path)) for path in self.paths_of(self.strategies)}}

    def paths_of(self, strategies: Iterable[str]) -> list[str]:
        """The configs and scripts of these strategies."""
        configs = [file for name in strategies for file in files_of(self.strategies[name].get("config"))]
        scripts = [self.script_of(name) for name in strategies]
        return list(dict.fromkeys([*files_of(self.config), *configs, *scripts]))

    @property
    def digest(self) -> str:
        return text_digest(json.dumps(self.content, sort_keys=True))

    def refuse_others(self) -> None:
        """Raise InputError if the sweep's folder has runs of another plan, with which those of this one would mix.
        Strategies may have been added, and those that have no runs changed or removed."""
        path = Path(self.output_dir, PLAN_FILE)
        if not path.is_file():
            return
        kept = read_yaml(path)
        with blame(f"{path}: not a plan that a sweep has kept", TypeError, AttributeError, KeyError, IndexError):
            was = Plan(**{name: value for name, value in kept.items() if name != "files"})
            begun = dict.fromkeys(run.strategy for run in was.runs() if (run.folder / MANIFEST_FILE).exists())
            changes = list(self.changes(kept, begun)) if begun else []
        if changes:
            raise InputError(
                f"{path}: its runs are of another plan, with which those of this one would mix: {'; '.join(changes)}; "
                "give another output_dir (a strategy that has no runs, or none any more, may be changed or removed)"
            )

    def keep(self) -> None:
        """Write the plan into the sweep's folder, whose runs are of it from now on."""
        path = Path(self.output_dir, PLAN_FILE)
        with blame(f"output_dir: {self.output_dir}", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True), shared=True)

    def changes(self, kept: dict[str, Any], begun: Iterable[str]) -> Iterator[str]:
        """What of a plan by which the strategies `begun` have runs is otherwise in this one. What is new beside it does
        not matter."""
        for name, now in self.content.items():
            was = kept.get(name)
            if name == "strategies":
                for strategy in begun:
                    if strategy not in now:
                        yield f"strategies.{strategy} is gone"
                    elif was[strategy] != now[strategy]:
                        yield f"strategies.{strategy} was {was[strategy]!r:.80}"
            elif name == "files":
                paths = self.paths_of([strategy for strategy in begun if strategy in self.strategies])
                yield from (f"{path} is not as it was" for path in paths if was.get(path) != now[path])
            elif was != now and not (name == "baseline" and was not in begun):
                yield f"{name} was {was!r:.80} and is {now!r:.80}"


def load_plan(path: Path) -> Plan:
    """Read a plan and check it.

    Raises:
        InputError: it is no plan, or something in it is not allowed; names the file and the field.
    """
    content = read_yaml(path)
    content.pop("files", None)  # of one that was kept
    fields = {field.name: field for field in dataclasses.fields(Plan)}
    for name in content:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(fields)}"
            raise InputError(f"{path}: {name}: no such field; {hint}")
    for name, of_plan in fields.items():
        is_needed = of_plan.default is dataclasses.MISSING and of_plan.default_factory is dataclasses.MISSING
        if is_needed and name not in content:
            raise InputError(f"{path}: {name}: must be there")
    for name in ("strategies", "fields"):
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"{path}: {name}: must be a mapping, got {content[name]!r:.60}")
    check_types(content, str(path))
    if not content["strategies"]:
        raise InputError(f"{path}: strategies: must not be empty")
    content["strategies"] = {name: own or {} for name, own in content["strategies"].items()}
    for name, own in content["strategies"].items():
        if not isinstance(name, str):
            raise InputError(f"{path}: strategies: must be called by texts, got {name!r} (a text is {str(name)!r:.60})")
        if not isinstance(own, dict):
            raise InputError(f"{path}: strategies.{name}: must be {{field: value}}, got {own!r:.60}")
        check_types({part: own[part] for part in OF_STRATEGY if part in own}, f"{path}: strategies.{name}")
    with within(str(path)), blame("a value is of another type than there should be", TypeError, AttributeError):
        plan = Plan(**content)
        plan.check()
    return plan


def check_types(content: dict[str, Any], where: str) -> None:
    """Raise InputError for a value of another type than its field has; lists of numbers are looked at by themselves."""
    for name, (are_of, what) in TYPES.items():
        if name in content and not are_of(content[name]):
            raise InputError(f"{where}: {name}: must be {what}, got {content[name]!r:.60}")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(is_text, value)))


TYPES = {
    "config": (are_texts, "a file or a list of files"),
    "output_dir": (is_text, "a folder"),
    "ledger": (is_text, "a file"),
    **dict.fromkeys(
        ("script", "baseline", "metric"), (lambda value: value is None or is_text(value), "a text or null")
    ),
    "looks": (lambda value: type(value) is int, "a whole number"),
}


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    with blame(f"{path}: not YAML", yaml.YAMLError):
        content = yaml.load(text, StrictLoader)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a mapping of names to values")
    return content


@functools.lru_cache(maxsize=1000)
def checked_config(script: str, argv: tuple[str, ...]) -> Any:
    return parse_config(SCRIPTS[script], argv, prog="difftrain sweep")


@contextmanager
def within(where: str) -> Iterator[None]:
    """Say where an InputError's field is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def require(allowed: bool, name: str, rule: str) -> None:
    if not allowed:
        raise InputError(f"{name}: {rule}")


def numbers(values: Any, name: str) -> list[float]:
    """YAML takes 1e-3 for a text."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        found = [math.nan]
    if not isinstance(values, list) or bool in map(type, values) or not all(map(math.isfinite, found)):
        raise InputError(f"{name}: must be a list of numbers, got {values!r:.80}")
    return found


def files_of(config: str | list[str] | None) -> Iterable[str]:
    return [config] if isinstance(config, str) else config or []


def as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
