"""The trained weights alone, to draw with: of some steps, and of the best evaluation.

`weights/step-000500.safetensors` holds what is trained, with LoRA the adapters, as "denoiser.NAME" and
"text_encoders.NAME": the EMA weights where there are any, as in what the run exports. Its metadata says as JSON which
"step" it is of, and whether "weights" are "raw" or "ema". `best.safetensors` has its "metric" and "value" besides.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from difftrain_utils.config.training import BEST_IS
from difftrain_utils.errors import InputError, blame
from difftrain_utils.files import new_file
from difftrain_utils.optimization.ema import EMA
from difftrain_utils.optimization.trained import trained_weights
from difftrain_utils.run.metrics import read_metrics
from difftrain_utils.run.run_folder import BEST_FILE, METRICS_FILE, WEIGHTS, read_about_weights


def named_weights(models: Mapping[str, torch.nn.Module], ema: EMA | None = None) -> dict[str, torch.Tensor]:
    """What is trained of the "denoiser" and the "text_encoders", or its average, by its name in a file."""
    parts = [part for part in ("denoiser", "text_encoders") if part in models]
    names = {f"{part}.{name}": value for part in parts for name, value in trained_weights(models[part]).items()}
    return names if ema is None else dict(zip(names, ema.averages, strict=True))


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write `named_weights`, whole or not at all.

    Raises:
        RunError: they cannot be written.
    """
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    with new_file(path) as partial:
        save_file(tensors, partial, {WEIGHTS: json.dumps(about)})


def load_weights(path: Path, denoiser: torch.nn.Module, text_encoders: torch.nn.Module | None = None) -> dict[str, Any]:
    """Read such a file into what `trained_models` has made for the run's config, and return what its metadata says.

    Raises:
        InputError: it is damaged, no such file, or of other models.
    """
    about = read_about_weights(path)
    names = named_weights({"denoiser": denoiser} | ({} if text_encoders is None else {"text_encoders": text_encoders}))
    with blame(str(path), OSError, SafetensorError), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(shapes.keys() | names.keys()):
            wanted = tuple(names[name].shape) if name in names else "not there"
            if (found := shapes.get(name, "not there")) != wanted:
                raise InputError(f"{path}: is of other models: {name} is {found}, and here {wanted}")
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(file.get_tensor(name))
    return about


def is_best(output_dir: Path, step: int, metric: str, value: float) -> bool:
    """Whether an evaluation is better than all before `step` that metrics.jsonl has; what is not finite never is. A run
    that resumes has cut that file back, so that it decides as an unbroken one."""
    entries = read_metrics(output_dir / METRICS_FILE)
    before = [entry[metric] for entry in entries if metric in entry and entry["step"] < step]
    sign = 1 if BEST_IS[metric] == "lowest" else -1
    return math.isfinite(value) and all(sign * value < sign * other for other in before if math.isfinite(other))


def describe_best(output_dir: Path) -> str | None:
    """What `best.safetensors` holds, in words; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path = output_dir / WEIGHTS / BEST_FILE
    if not path.exists():
        return None
    about = read_about_weights(path)
    with blame(str(path), LookupError):
        return f"{path} holds the weights of step {about['step']} ({about['metric']} {about['value']:.4g})"
