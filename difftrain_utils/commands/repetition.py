"""A run and its repetition: what was otherwise, whether it came out the same, and if not, why."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from difftrain_utils.commands.compare import Run, brief, differing, facts_of, flatten
from difftrain_utils.files import digest_of_each
from difftrain_utils.run.metrics import TIMES, loss_trace_digest
from difftrain_utils.run.run_folder import METRICS_FILE
from difftrain_utils.run.saved_tensors import OPTIMIZER, SavedTensors

ALLOWED = 1e-5  # relative difference of a metric that float rounding explains, as between splits of a batch
ALLOWED_WEIGHTS = 1e-4  # norm of the weights' difference over their norm (40 steps on 1 and 2 threads: 6e-8)
# What may make a run another one, the most likely first: names in config, manifest and environment, by their starts.
SUSPECTS = {
    "data": ("data.",),
    "base model": ("base_model.",),
    "samples": ("stream",),
    "config": ("config.",),
    "code": ("git",),
    "precision": ("mixed_precision",),
    "number of processes": ("num_processes",),
    "hardware": ("device", "processor", "cpu_capability"),
    "versions": ("versions.", "cuda", "cudnn"),
    "threads": ("cpu_threads",),
    "determinism": ("deterministic",),
}


# ── What differs between then and now ────────────────────────────────────────────────────────────────────────
def circumstances(config: dict[str, Any], manifest: dict[str, Any], env: dict[str, Any]) -> dict[str, Any]:
    """All that is recorded of what decides a run's result, by the names in `SUSPECTS`. `config` is flat."""
    machine = {name: env.get(name) for name in ("processor", "cuda", "cudnn")}
    return flatten({"config": config, "package": env["packages"]}) | facts_of(manifest, env) | machine


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each difference, the most suspicious first; all but the main packages share the last line."""
    found, lines = differing([then, now]), []
    for what, starts in SUSPECTS.items():
        names = [name for name in found if name.startswith(starts)]
        lines += [f"{what}: {name} {brief(found[name][0])} then, {brief(found[name][1])} now" for name in names]
    main = {name.split(".")[1] for name in then if name.startswith("versions.")}
    names = [name.removeprefix("package.") for name in found if name.startswith("package.")]
    others = [name for name in names if name.lower() not in main]
    if others:
        lines.append(f"versions: {len(others)} other packages ({', '.join(others[:5])}{', …' if others[5:] else ''})")
    return lines


def likely_reasons(run: Run, manifest: dict[str, Any], found: list[str]) -> list[str]:
    """What may be why the run came out otherwise, the most likely first: `found` are the `changes`."""
    reasons, segments = [], manifest["segments"]
    if "final" in manifest and loss_trace_digest(run.folder / METRICS_FILE) != manifest["final"]["loss_trace"]:
        reasons.append(f"{run.folder / 'metrics.jsonl'} was changed after the run: the manifest has another digest")
    reasons += found
    for number, segment in enumerate(segments, 1):
        if segment.get("differs"):
            reasons.append(f"segment {number} of the run was with other {', '.join(segment['differs'])} than the first")
    if len(segments) > 1:
        reasons.append("the run was resumed: of its settings, only those of its last start are recorded")
    if manifest["device"] != "cpu" and not manifest["deterministic"]:
        reasons.append(f"determinism: train.deterministic was off on a GPU ({manifest['device']})")
    if manifest["git"] is None:
        reasons.append("code: the run recorded no git commit, so it may be other code now")
    return reasons


# ── Whether it came out the same ───────────────────────────────────────────────────────────────────────────────
class Deviation(NamedTuple):
    """A value of metrics.jsonl that is not the same; None where only the other run has it."""

    step: int
    name: str
    then: Any
    now: Any

    @property
    def relative(self) -> float:
        """The difference over the larger of the two; infinite where it cannot be known."""
        if not all(type(value) in (int, float) and math.isfinite(value) for value in (self.then, self.now)):
            return math.inf
        if self.then == self.now:  # 0 and -0.0
            return 0.0
        return abs(self.then - self.now) / max(abs(self.then), abs(self.now))

    def __str__(self) -> str:
        then, now = ("absent" if v is None else f"{v:.7g}" if type(v) is float else v for v in (self.then, self.now))
        return f"{self.name} {then} then, {now} now"


def deviations(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[Deviation]:
    """All values that are not equal to the last bit, times aside, by step and in the order of a line."""

    def values(entry: dict[str, Any]) -> dict[str, Any]:
        entry = {name: value for name, value in entry.items() if name not in TIMES}
        return flatten({k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in entry.items()})

    tables = [{entry["step"]: values(entry) for entry in metrics} for metrics in (then, now)]
    found = []
    for step in sorted({step for table in tables for step in table}):
        was, value = (table.get(step, {}) for table in tables)
        pairs = [Deviation(step, name, was.get(name), value.get(name)) for name in was | value]
        found += [pair for pair in pairs if repr(pair.then) != repr(pair.now)]  # exact, and NaN equals NaN
    return found


class Weights(NamedTuple):
    """What came of the weights: what they are called, their digest now, and whether all digests are as then. If not,
    the largest difference of a number, and the norm of the difference over theirs (of the file where it is largest)."""

    name: str
    digest: str
    same: bool
    largest: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        if self.same:
            return f"{self.name} {self.digest[:12]}"
        if not math.isfinite(self.relative):
            return f"{self.name} differ, by how much cannot be known (tensors are missing, or not finite)"
        size = f"by {self.largest:.2g} in the number that differs most, by {self.relative:.1g} of their norm"
        return f"{self.name} differ {size} (allowed {ALLOWED_WEIGHTS:g})"


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the weights of a checkpoint and their averages, whoever wrote them."""
    with weights_in(folder) as parts:
        names = {
            f"{part}/{name}": (saved, saved_part, name)
            for part, (saved, saved_part) in parts.items()
            for name in saved.shapes(saved_part)
        }
        return digest_of_each(names, lambda key: names[key][0].read(*names[key][1:]))


@contextmanager
def weights_in(folder: Path) -> Iterator[dict[str, tuple[SavedTensors, str]]]:
    """All weights below a folder by their part: whose part of that name they are. An optimizer's state is none."""
    with ExitStack() as stack:
        found = {}
        for place in sorted({path.parent for path in folder.rglob("*.safetensors")}):
            saved = stack.enter_context(SavedTensors(place))
            of_place = place.relative_to(folder)
            found |= {str(of_place / part): (saved, part) for part in saved.parts if part != OPTIMIZER}
        yield found


def compare_weights(name: str, folders: list[Path], digests: list[dict[str, str]]) -> Weights:
    """Compare the safetensors below two folders, unless the digests of the weights, then and now, are the same.

    The last of the digests now is the one to show.
    """
    weights = Weights(name, list(digests[1].values())[-1], digests[0] == digests[1])
    if weights.same:
        return weights
    unknown, largest, relative = weights._replace(largest=math.inf, relative=math.inf), [0.0], [0.0]
    with weights_in(folders[0]) as then, weights_in(folders[1]) as now:
        shapes = [{part: saved.shapes(name) for part, (saved, name) in of.items()} for of in (then, now)]
        if shapes[0] != shapes[1]:
            return unknown
        for part, names in shapes[0].items():
            norms, changes = [], []
            for key in names:  # tensor by tensor, for the memory's sake
                tensors = [saved.read(saved_part, key).double() for saved, saved_part in (then[part], now[part])]
                change = tensors[1] - tensors[0]
                norms.append(torch.linalg.vector_norm(tensors[0]).item())
                changes.append(torch.linalg.vector_norm(change).item())
                largest.append(torch.linalg.vector_norm(change, torch.inf).item() if change.numel() else 0.0)
            relative.append(math.hypot(*changes) / (math.hypot(*norms) or 1.0))
    if not all(map(math.isfinite, relative)):
        return unknown
    return weights._replace(largest=max(largest), relative=max(relative))


def verdict(what: str, found: list[Deviation], weights: Weights | None, reasons: list[str]) -> tuple[str, int]:
    """(the last lines of the report, the exit code). `what` was compared, `weights` is None if they were not."""
    of_weights = "no weights to compare" if weights is None else str(weights)
    if not found and (weights is None or weights.same):
        return f"bit-identical: {what}, {of_weights}", 0
    far = [deviation for deviation in found if deviation.relative > ALLOWED]
    near = "all metrics are the same"
    if found:
        worst = max(found, key=lambda deviation: deviation.relative)
        size, where = f"{worst.relative:.1g} (allowed {ALLOWED:g})", f"in {worst.name} at step {worst.step}"
        near = f"largest relative difference of a metric {size}, {where}"
    if not far and (weights is None or weights.relative <= ALLOWED_WEIGHTS):
        return f"equal within a tolerance: {near}; {of_weights}; {what}", 0
    text = f"differs in the weights: {of_weights}; {near}"
    if far:
        earlier = f" (in the last bits from step {found[0].step} on)" if found[0].step < far[0].step else ""
        text = f"differs from step {far[0].step} on{earlier}: {far[0]}; {of_weights}"
    unknown = "no difference is recorded: perhaps of kernels that are not deterministic (train.deterministic chooses "
    unknown += "others), or of files that git does not track"
    return "\n  ".join([f"{text}\nlikely because of:", *(reasons[:5] or [unknown])]), 1
