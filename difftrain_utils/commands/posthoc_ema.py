"""Make a pipeline with an average of the weights of any width, after the run that stored EMA snapshots.

    difftrain posthoc-ema runs/quickstart --sigma-rel 0.1 --output-dir runs/sigma-0.1

The formulas are in power_ema.py. RUN/pipeline is copied with another denoiser; RUN is left as it is.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from difftrain_utils.commands.parser import Parser
from difftrain_utils.errors import InputError, blame
from difftrain_utils.run.run_folder import EMA_SNAPSHOTS, PIPELINE
from difftrain_utils.run.source import INDEX_FILE, MODEL_FILE

if TYPE_CHECKING:
    import torch

MAX_RESIDUAL = 0.05


def find_snapshots(run: Path) -> list[tuple[Path, float, int]]:
    """The run's snapshots as (file, γ, step), in the order of their steps."""
    from safetensors import SafetensorError, safe_open

    from difftrain_utils.optimization.power_ema import gamma_of

    found = []
    for path in (run / EMA_SNAPSHOTS).glob("step-*.safetensors"):
        with blame(f"{path}", OSError, SafetensorError, ValueError), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            metadata |= json.loads(metadata.get("ema_snapshot", "{}"))  # two entries before
            if not {"sigma_rel", "step"} <= metadata.keys():
                raise ValueError("no EMA snapshot: its metadata lacks sigma_rel or step")
            found.append((path, gamma_of(float(metadata["sigma_rel"])), int(metadata["step"])))
    if len(found) < 2:
        raise InputError(f"{run / EMA_SNAPSHOTS}: needs 2 or more EMA snapshots, found {len(found) or 'none'}")
    return sorted(found, key=lambda snapshot: (snapshot[2], snapshot[0]))


def weighted_sum(paths: list[Path], weights: list[float]) -> dict:
    """Σ weight · tensor for each name in the snapshots, summed in float64, returned as float32."""
    import torch
    from safetensors.torch import load_file

    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        tensors = load_file(path)
        total = total or {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
        check_same_parameters(tensors, total, f"{path}", f"{paths[0]}")
        for name, tensor in tensors.items():
            total[name] += weight * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def check_same_parameters(tensors: dict, others: dict, name: str, other_name: str) -> None:
    """Raise InputError unless both have the same names and shapes."""
    for parameter in sorted(tensors.keys() | others.keys()):
        shape, other = (
            f"of shape {tuple(t[parameter].shape)}" if parameter in t else "absent" for t in (tensors, others)
        )
        if shape != other:
            raise InputError(f"{name}: {parameter} is {shape}, but {other} in {other_name}")


def average_of_width(
    run: Path, sigma_rel: float, step: int | None, fields: tuple[str, str] = ("--sigma-rel", "--step")
) -> "dict[str, torch.Tensor]":
    """The denoiser's parameters of the width `sigma_rel` at `step` (None: the last snapshot) by name; says from how
    many snapshots, and warns of a bad fit. `fields` are what the two are called on the command line.

    Raises:
        InputError: there is no such width or step, or the snapshots are too few or damaged.
    """
    from difftrain_utils.optimization.power_ema import gamma_of, reconstruction_weights, relative_residual

    with blame(fields[0], ValueError):
        gamma = gamma_of(sigma_rel)
    snapshots = find_snapshots(run)
    first, last = snapshots[0][2], snapshots[-1][2]
    step = last if step is None else step
    if not first <= step <= last:
        raise InputError(f"{fields[1]}: must be from {first} to {last}, the first and the last snapshot, got {step}")
    profiles = [(snapshot_gamma, end) for _, snapshot_gamma, end in snapshots]
    weights = reconstruction_weights(profiles, gamma, step)
    weights_sum = sum(weights)
    weights = [weight / weights_sum for weight in weights]  # what never changed stays what it was
    residual = relative_residual(profiles, weights, gamma, step)
    print(
        f"sigma_rel {sigma_rel} at step {step} from {len(snapshots)} snapshots: weights' sum {weights_sum:.6f} "
        f"(then divided by it), relative residual {residual:.2g}"
    )
    if residual > MAX_RESIDUAL:
        print(
            f"warning: the residual is above {MAX_RESIDUAL}: the snapshots do not add up to this average; steps at "
            "which there are snapshots, and widths near the stored ones, fit better",
            file=sys.stderr,
        )
    return weighted_sum([path for path, *_ in snapshots], weights)


def load_pipeline(folder: Path) -> "tuple[list[torch.nn.Module], Callable[[Path], None]]":
    """The models of a pipeline, or of a text model's folder, and what writes it with them. Raises InputError if it
    cannot be loaded."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers.utils.logging, transformers.logging):
        library.disable_progress_bar()
    if not (folder / INDEX_FILE).is_file():
        from difftrain_utils.commands.text_model import load_text_model

        family, denoiser = load_text_model(str(folder))
        return [denoiser], partial(family.save_pipeline, denoiser=denoiser)
    with blame(f"{folder}", OSError, ValueError, AttributeError, KeyError):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return parts, lambda place: pipeline.save_pretrained(place)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="difftrain posthoc-ema", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's output folder, with ema_snapshots/ and pipeline/"
    )
    parser.add_argument("--sigma-rel", type=float, required=True, help="width of the average, as a share of the run")
    parser.add_argument("--step", type=int, help="where the average ends; default: the last snapshot")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the new pipeline goes")
    args = parser.parse_args(argv)
    source = args.run / PIPELINE
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise InputError(f"--output-dir {args.output_dir} is not an empty folder")
    if not any((source / name).is_file() for name in (INDEX_FILE, MODEL_FILE)):
        raise InputError(f"{source}: no such pipeline")

    import torch

    from difftrain_utils.files import new_folder

    # ── The run's pipeline around it ─────────────────────────────────────────────────────────────────────────
    parameters = average_of_width(args.run, args.sigma_rel, args.step)
    parts, save = load_pipeline(source)
    of_parts = [dict(part.named_parameters()) for part in parts]
    own = max(of_parts, key=lambda own: len(own.keys() & parameters.keys()), default={})  # the denoiser
    if not own.keys() & parameters.keys():
        raise InputError(f"{source}: none of its parts has the parameters of {args.run / EMA_SNAPSHOTS}")
    check_same_parameters(parameters, own, f"{args.run / EMA_SNAPSHOTS}", f"{source}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])
    with new_folder(args.output_dir.resolve()) as folder:
        save(folder)
    print(f"Done: {args.output_dir} holds the pipeline")
