"""The ledger of finished comparisons, `experiments.jsonl`: a line for each, and whether its runs still say the same."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

from difftrain_utils.commands.sweep_plan import COMPARE, PLAN_FILE, Plan, load_plan
from difftrain_utils.commands.sweep_report import FINISHED, Findings, findings, status_of
from difftrain_utils.errors import InputError, blame
from difftrain_utils.run.metrics import loss_trace_digest
from difftrain_utils.run.run_folder import METRICS_FILE, read_manifest

NUMBERS = ("difference", "low", "high", "p")


def line_of(plan: Plan, found: Findings) -> dict[str, Any]:
    """A finished comparison: which plan and code, which runs by the digests of their weights and metrics, which rates
    and verdicts."""
    settings = {}
    for called, result in found.results.items():
        own: dict[str, Any] = {"verdict": result.verdict}
        if result.paired is not None:
            values = (result.paired.mean, result.paired.low, result.paired.high, result.p)
            own |= dict(zip(NUMBERS, values, strict=True))
        settings[called] = own
    for strategy, choice in found.choices.items():
        settings.setdefault(strategy, {}).update(learning_rate=choice.rate, at_edge=choice.is_at_edge)
    runs = {str(run.folder): digests_of(run.folder) for run in plan.runs() if run.stage == COMPARE}
    of_code = next((read_manifest(Path(folder)) for folder, of_run in runs.items() if "weights" in of_run), {})
    git = of_code.get("git") or {}
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": plan.output_dir,
        "plan": plan.digest,
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "metric": plan.measure,
        "baseline": plan.baseline,
        "settings": settings,
        "runs": runs,
    }


def digests_of(folder: Path) -> dict[str, Any]:
    """Of a run's final weights, as its manifest has them, and of its metrics as they are; or what became of it."""
    status = status_of(folder)
    if status != FINISHED:
        return {"status": status}
    return {"weights": read_manifest(folder)["final"]["weights"], "metrics": loss_trace_digest(folder / METRICS_FILE)}


def append(plan: Plan, found: Findings) -> int | None:
    """Write a finished comparison into the ledger; returns the number of its line. None: one of its lines says it."""
    line, path = line_of(plan, found), Path(plan.ledger)
    lines, own = read_lines(path) if path.is_file() else [], json.loads(json.dumps(line))
    if any({**earlier, "finished": own["finished"]} == own for earlier in lines):
        return None
    with blame(f"ledger: {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(lines) + 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger. Raises InputError for one that is none."""
    with blame(str(path), OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        with blame(f"{path} line {number}: not JSON", ValueError):
            found.append(json.loads(line))
        if not isinstance(found[-1], dict) or not found[-1].keys() >= {"folder", "plan", "settings", "runs"}:
            raise InputError(f"{path} line {number}: not a line of a ledger of comparisons")
    return found


def place_in(text: str) -> tuple[Path, int] | None:
    """`experiments.jsonl:3` as file and line; None for a run's folder."""
    match = re.fullmatch(r"(.+\.jsonl):(\d+)", text)
    return (Path(match[1]), int(match[2])) if match else None


def read_line(path: Path, number: int) -> dict[str, Any]:
    lines = read_lines(path)
    if not 1 <= number <= len(lines):
        raise InputError(f"{path}:{number}: no such line; it has {len(lines)}")
    return lines[number - 1]


def deviations_from(line: dict[str, Any]) -> list[str]:
    """What a comparison, made once more from the folders of its runs, says otherwise than its line in the ledger.

    Raises:
        InputError: the folder, or a run's, is not there.
    """
    folder = Path(line["folder"])
    plan = load_plan(folder / PLAN_FILE)
    found, then = [], line["settings"]
    if plan.digest != line["plan"]:
        found.append(
            f"{folder / PLAN_FILE} is of another plan by now: strategies may have been added, or files changed"
        )
    for run, was in line["runs"].items():
        now = json.loads(json.dumps(digests_of(Path(run))))
        found += [f"{run}: other {name} than then" for name in was | now if was.get(name) != now.get(name)]
    now = line_of(plan, findings(plan))["settings"]
    for called, was in then.items():
        for name, value in was.items():
            new = now.get(called, {}).get(name)
            is_close = name in NUMBERS and None not in (value, new) and math.isclose(value, new, rel_tol=1e-9)
            if value != new and not is_close:
                found.append(f"{called}: {name} was {value} and is {new}")
    return found
