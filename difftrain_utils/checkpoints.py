"""Checkpoints to resume from: complete or absent, never half.

`checkpoint-500/` holds accelerate's `save_state` (weights, optimizer, learning rate, loss scale), the EMA
weights as `ema.safetensors`, and `training_state.json`. It is written aside and renamed when it is
complete. There is no random state in it, for keyed samples need none, and nothing that is unpickled.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from difftrain_utils.errors import InputError, blame
from difftrain_utils.power_ema import SNAPSHOTS, PowerEMA

STATE_FILE, EMA_FILE, POWER_EMA_FILE = "training_state.json", "ema.safetensors", "power_ema.safetensors"
PARTIAL = ".partial"


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: dict[str, Any],
    ema_model: EMAModel | None,
    power_ema: PowerEMA | None,
    keep: int,
) -> None:
    """Write `output_dir/checkpoint-{state["global_step"]}`, then delete all but the `keep` newest (0: none).

    All processes call it. `state` is what else the loop needs to go on, as JSON.
    """
    folder = output_dir / f"checkpoint-{state['global_step']}"
    partial = folder.with_name(folder.name + PARTIAL)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for random_state in partial.glob("random_states_*.pkl"):
            random_state.unlink()
        if ema_model is not None:
            save_file({str(i): p.contiguous() for i, p in enumerate(ema_model.shadow_params)}, partial / EMA_FILE)
        if power_ema is not None:
            save_file(power_ema.state_tensors(), partial / POWER_EMA_FILE)
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        replace_folder(partial, folder)
        if keep:
            for _, old in list_checkpoints(output_dir)[:-keep]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Accelerator, folder: Path, ema_model: EMAModel | None, power_ema: PowerEMA | None, max_steps: int
) -> dict[str, Any]:
    """Bring everything that was prepared back to where `folder` left it, and return the loop's state.

    Raises:
        InputError: the folder is no checkpoint of this run's model, optimizer and EMA setting, or is past `max_steps`.
    """
    with blame(f"train.resume_from: cannot load {folder}", OSError, RuntimeError, ValueError, KeyError):
        state = json.loads((folder / STATE_FILE).read_text())
        if state["global_step"] > max_steps:
            raise ValueError(f"it is past train.max_steps, which is {max_steps}")
        accelerator.load_state(str(folder))
        if ema_model is not None:
            saved = load_file(folder / EMA_FILE)
            for i, shadow in enumerate(ema_model.shadow_params):
                shadow.copy_(saved[str(i)])
            ema_model.optimization_step = state["global_step"]
        if power_ema is not None:
            power_ema.load_state_tensors(load_file(folder / POWER_EMA_FILE))
    return state


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `train.resume_from` names; None to start from the beginning.

    Raises:
        InputError: the named folder is no checkpoint, or `output_dir` holds a run that would be mixed with
            this one.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from == "latest":
        return checkpoints[-1][1] if checkpoints else None
    if resume_from is not None:
        folder = Path(resume_from).expanduser()
        if not (folder / STATE_FILE).is_file():
            there = ", ".join(path.name for _, path in checkpoints) or "no checkpoint"
            raise InputError(f"train.resume_from: no checkpoint at {folder}; {output_dir} has {there}")
        if checkpoints and checkpoints[-1][1].resolve() != folder.resolve():
            raise InputError(
                f"train.resume_from: {folder} is not the newest checkpoint of {output_dir}, which is "
                f"{checkpoints[-1][1].name}: a folder holds one history; give another --output-dir"
            )
        return folder
    if checkpoints:
        raise InputError(
            f"train.output_dir: {output_dir} already holds a run ({checkpoints[-1][1].name}); go on with "
            "--resume-from latest, replace it with --train.overwrite, or give another --output-dir"
        )
    return None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def delete_run(output_dir: Path) -> None:
    """Delete what a run leaves in its folder, checkpoints first, and nothing else."""
    for path in [
        *output_dir.glob("checkpoint-*"),
        *(output_dir / name for name in ("pipeline", "samples", "logs", SNAPSHOTS)),
    ]:
        shutil.rmtree(path, ignore_errors=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give `partial` the name `folder`, all its bytes on disk first; an older `folder` goes after that."""
    for path in [*partial.rglob("*"), partial]:
        _fsync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
