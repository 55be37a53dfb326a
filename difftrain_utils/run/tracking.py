"""metrics.jsonl, and accelerate's trackers beside it."""

import dataclasses
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError
from difftrain_utils.files import write_file
from difftrain_utils.run.metrics import read_metrics


def check_trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers as a list. Accelerate would drop one that is not installed without a word: refuse it.

    Raises:
        InputError: a tracker is unknown or not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    known = [tracker.value for tracker in LoggerType if tracker != LoggerType.ALL]
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in names:
        if name not in known:
            raise InputError(f"train.report_to: no tracker {name!r}; there is {', '.join(known)}")
        if name not in available:
            raise InputError(f"train.report_to: {name} is not installed (pip install {name})")
    return names


class Totals:
    """What adds up between two lines of metrics, kept on the device so that it need not be asked at each step. A
    checkpoint holds `state()`, so that the line after a resume is that of an unbroken run."""

    def __init__(self, accelerator: Accelerator, state: dict[str, Any] | None = None):
        self.accelerator = accelerator
        state = state or {"losses": [0.0], "steps": 0, "skipped_rows": 0}
        # a sum for each process, for rounding depends on how a sum is put together
        loss = fmean(state["losses"])
        if len(state["losses"]) == accelerator.num_processes:
            loss = state["losses"][accelerator.process_index]
        self.loss = torch.full((), loss, device=accelerator.device)
        self.step_loss, self.step_rows = torch.zeros_like(self.loss), 0
        self.steps = state["steps"]
        self.skipped_rows = state["skipped_rows"] if accelerator.is_main_process else 0  # the sum over all processes

    def add(self, loss: torch.Tensor, skipped: list[bool]) -> None:
        """A part of a step: its share of the step's loss, and which of its samples other rows stand in for."""
        self.step_loss += loss
        self.step_rows += sum(skipped)

    def end_step(self, is_finite: bool) -> None:
        """A step whose gradient is not finite does not count for the loss."""
        if is_finite:
            self.loss, self.steps = self.loss + self.step_loss, self.steps + 1
        self.skipped_rows += self.step_rows
        self.step_loss, self.step_rows = torch.zeros_like(self.loss), 0

    def state(self) -> dict[str, Any]:
        """The totals of all processes, which all of them ask for; of the losses, one sum for each process."""
        rows = torch.tensor(float(self.skipped_rows), device=self.loss.device)
        losses = self.accelerator.gather(self.loss.view(1)).tolist()
        rows = round(self.accelerator.reduce(rows, "sum").item())
        return {"losses": losses, "steps": self.steps, "skipped_rows": rows}

    def take(self) -> dict[str, Any]:
        """{"loss": mean of the steps, "skipped_rows": sum}, and begin anew; without a loss if no step counted."""
        state = self.state()
        self.__init__(self.accelerator)
        loss = {"loss": fmean(state["losses"]) / state["steps"]} if state["steps"] else {}
        return loss | {"skipped_rows": state["skipped_rows"]}


class Metrics:
    """Writes `metrics.jsonl` (one JSON object a logged step) and passes the values on to the trackers.

    A resumed run cuts the file back to the step that it goes on from, so that it ends like an unbroken one.

    Raises:
        InputError: the file to cut back is damaged, other than by a last line that was cut off.
    """

    def __init__(self, accelerator: Accelerator, config: Config, global_step: int):
        self.accelerator = accelerator
        self.path = Path(config.train.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:
            _cut_back(self.path, global_step)
        if accelerator.log_with:
            sections = dataclasses.asdict(config).items()
            flat = {f"{s}.{name}": _primitive(value) for s, fields in sections for name, value in fields.items()}
            # a resumed TensorBoard run hides what the run that was cut off logged after this step
            tensorboard = {"purge_step": global_step + 1} if global_step else {}
            accelerator.init_trackers("difftrain", flat, init_kwargs={"tensorboard": tensorboard})

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.accelerator.log(values, step=step)

    def log_images(self, step: int, name: str, images: list[Image.Image]) -> None:
        """Show images of one size in the trackers that show images (TensorBoard, Weights & Biases)."""
        for tracker in self.accelerator.trackers:
            kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if tracker.name in ("tensorboard", "wandb"):
                tracker.log_images({name: np.stack([np.asarray(image) for image in images])}, step=step, **kwargs)


def _cut_back(path: Path, global_step: int) -> None:
    if path.exists():
        kept = [entry for entry in read_metrics(path) if entry["step"] <= global_step]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _primitive(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
