"""Reading metrics.jsonl, as the run itself does on resume and as the tools do after it. Imports neither torch nor
accelerate, so that a tool starts at once."""

import json
from pathlib import Path
from typing import Any

from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import text_digest

# What differs between two equal runs
TIMES = ("samples_per_second", "data_wait", "step_time_median", "step_time_p95", "peak_memory_gb", "mfu")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order; a last line that a crash cut off is left out.

    Such a line has no line break, because a line is written together with its break.

    Raises:
        InputError: the file cannot be read, or any other line is not a JSON object with a step (names the line).
    """
    with blame(str(path), OSError):
        lines = path.read_bytes().split(b"\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)  # what follows the last line break: nothing, unless it was cut off
        try:
            entry = json.loads(line.decode())
        except ValueError as error:
            if is_last:
                continue
            raise InputError(f"{path} line {number}: not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise InputError(f"{path} line {number}: must be a JSON object with a step")
        metrics.append(entry)
    return metrics


def loss_trace_digest(path: Path) -> str:
    """SHA-256 over a metrics.jsonl without the times of its steps."""
    entries = read_metrics(path) if path.exists() else []  # a run that branched off at its last step
    metrics = [{k: v for k, v in entry.items() if k not in TIMES} for entry in entries]
    return text_digest(json.dumps(metrics))
