"""What a run leaves in its folder, by name. Imports no torch, so that a tool starts at once."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import find_damage

CONFIG_FILE, ENVIRONMENT_FILE, MANIFEST_FILE = "config.resolved.yaml", "env.json", "run_manifest.json"
METRICS_FILE, LOCK_FILE = "metrics.jsonl", "run.lock"
DIVERGED = "diverged"  # why a start of a run ended, in its manifest
SAMPLES, VALIDATION, TRACKERS, PROFILE = "samples", "validation", "logs", "profile"
EMA_SNAPSHOTS, WEIGHTS, PIPELINE, LORA = "ema_snapshots", "weights", "pipeline", "lora"
BEST_FILE = "best.safetensors"  # of WEIGHTS
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")  # and peft's, of text models
KOHYA_FILE, SINGLE_FILE = "kohya.safetensors", "single_file.safetensors"  # of `difftrain export`


WRITTEN = {  # what a run writes into its folders, as patterns of paths within them
    SAMPLES: tuple(f"step-*.{kind}" for kind in ("png", "txt", "mp4", "webp", "wav")),
    VALIDATION: ("step-*.safetensors",),
    TRACKERS: (
        *(f"{folder}/{name}" for folder in ("*", "*/*") for name in ("events.out.tfevents.*", "hparams.yml")),
        "wandb/**/*",
    ),
    PROFILE: ("trace.json.gz",),
    EMA_SNAPSHOTS: ("step-*.safetensors",),
    WEIGHTS: ("step-*.safetensors", BEST_FILE),
    LORA: (LORA_FILE, KOHYA_FILE, *PEFT_FILES),
    PIPELINE: (
        "model_index.json",
        SINGLE_FILE,
        *(f"*/*.{kind}" for kind in ("json", "safetensors", "txt", "model", "jinja")),
        *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),  # of texts
        *("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja"),
    ),
}


STATE_FILE, OPTIMIZER_FILE = "training_state.json", "optimizer.json"  # of a checkpoint
CHECKPOINT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.json", CONFIG_FILE)


def checkpoint_damage(folder: Path) -> str | None:
    """How a checkpoint differs from what was written; None if it is intact."""
    return find_damage(folder, listed=CHECKPOINT_FILES)


def artefacts(output_dir: Path) -> list[str]:
    """The names of what a run has left in a folder, but for checkpoints."""
    files = (CONFIG_FILE, ENVIRONMENT_FILE, MANIFEST_FILE, METRICS_FILE)
    return [name for name in (*files, *WRITTEN) if os.path.lexists(output_dir / name)]


def step_file(output_dir: str | Path, folder: str, step: int, suffix: str) -> Path:
    """The file of a step in one of a run's folders."""
    return Path(output_dir) / folder / f"step-{step:06d}{suffix}"


def sound_files(samples: Path) -> list[Path]:
    """The sounds of a grid of spectrograms, in the order of their prompts: `step-000500-00.wav` and so on, beside
    `step-000500.png`."""
    found = samples.parent.glob(f"{samples.stem}-*.wav")
    return sorted(found, key=lambda path: (len(path.name), path.name))  # more than 100 have longer names


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint in the run's."""
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None if it is called otherwise."""
    match = re.fullmatch(r"checkpoint-([0-9]+)", name)
    return int(match[1]) if match else None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = [(step_of(path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((step, path) for step, path in found if step is not None)


def is_checkpoint_of(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a run that resumes from it goes on in its folder, and does not branch off from another run."""
    return checkpoint.parent.resolve() == output_dir.resolve()  # the checkpoint itself may be a link


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises InputError if it is none."""
    parse, kind = (yaml.safe_load, "YAML") if path.suffix == ".yaml" else (json.loads, "JSON")
    with blame(f"{path}: not {kind}", yaml.YAMLError, ValueError), blame(str(path), OSError):
        content = parse(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a mapping of names to values")
    return content


def read_about_weights(path: Path) -> dict[str, Any]:
    """What the metadata of a file in `weights/` say: "step", "weights" (raw or ema), of the best "metric" and "value".

    Raises:
        InputError: it is damaged, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    with blame(str(path), OSError, SafetensorError), safe_open(path, "np") as file:
        metadata = file.metadata()
    with blame(f"{path}: no weights of a run, of which the metadata tells", ValueError, LookupError, TypeError):
        about = json.loads(metadata[WEIGHTS])
        return {"step": int(about["step"]), "weights": about["weights"]} | about


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of run_manifest.json, of a run's folder or a checkpoint's.

    Raises:
        OSError, ValueError: it is not there, or damaged.
    """
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("segments"), list):
        raise ValueError("not the manifest of a run")
    return manifest


def holds_run(output_dir: Path) -> bool:
    """Whether a run has left something in a folder, or anybody files of those names. The record that
    `difftrain validate-config` writes does not count."""
    found = artefacts(output_dir)
    if list_checkpoints(output_dir) or METRICS_FILE in found or WRITTEN.keys() & set(found):
        return True
    try:
        return bool(found) and read_manifest(output_dir)["segments"] != []
    except (OSError, ValueError):
        return True
