"""What a run leaves in its folder, by name. Imports no torch, so that a tool starts at once."""

import json
import re
from pathlib import Path
from typing import Any

CONFIG_FILE, ENVIRONMENT_FILE, MANIFEST_FILE = "config.resolved.yaml", "env.json", "run_manifest.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES, TRACKERS, PROFILE, EMA_SNAPSHOTS, PIPELINE = "samples", "logs", "profile", "ema_snapshots", "pipeline"


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint in the run's."""
    return f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def is_checkpoint_of(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a run that resumes from it goes on in its folder, and does not branch off from another run."""
    return checkpoint.resolve().parent == output_dir.resolve()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of run_manifest.json, of a run's folder or a checkpoint's."""
    return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
