"""What a run was: its config, code, machine, base model and data, written before its first step."""

import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from difftrain_utils.config.config import Config
from difftrain_utils.config.training import SOURCES
from difftrain_utils.devices import device_name
from difftrain_utils.errors import one_line, warn
from difftrain_utils.files import write_file
from difftrain_utils.keyed_random import STREAM_VERSION
from difftrain_utils.run.code import describe_git, describe_script, redact_command
from difftrain_utils.run.metrics import loss_trace_digest
from difftrain_utils.run.run_folder import (
    CONFIG_FILE,
    DIVERGED,
    ENVIRONMENT_FILE,
    LORA,
    MANIFEST_FILE,
    METRICS_FILE,
    PIPELINE,
    is_checkpoint_of,
    read_manifest,
)
from difftrain_utils.run.weights import describe_best

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "datasets", "safetensors", "numpy", "pillow")
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)


class Record:
    """What a run was: `config.resolved.yaml`, `env.json` and `run_manifest.json`, as `files` by name.

    All processes have it; the main process writes.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        denoiser_part: str,
        digests: dict[str, str],
        fingerprints: dict[str, dict[str, Any]],
        samples_per_epoch: int | None = None,
    ):
        """`digests` are those of the base model's parts, of which one is the denoiser; `fingerprints` are those of the
        data (`inspect_splits`), and `samples_per_epoch` is how many go through it once."""
        self.accelerator, self.config, self.fingerprints = accelerator, config, fingerprints
        script = Path(sys.argv[0]).resolve()
        self.manifest = {
            "started": _now(),
            "command": redact_command(sys.argv),
            "script_sha256": describe_script(script),
            "host": platform.node(),
            "git": describe_git(script, config.train.record_diff),
            "versions": describe_versions(),
            "seed": config.train.seed,
            "seeds": {source: config.train.seed_of(source) for source in SOURCES},
            "stream": STREAM_VERSION,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "num_processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
            "device": device_name(accelerator.device),
            "base_model": {
                "name": config.model.pretrained_model_name_or_path,
                "revision": config.model.revision,
                "denoiser": denoiser_part,
                "sha256": digests,
            },
            "data": fingerprints,
            "samples_per_epoch": samples_per_epoch,
            "segments": [],
        }
        self.environment = describe_environment()

    @property
    def files(self) -> dict[str, str]:
        """The contents, by file name."""
        return {
            CONFIG_FILE: self.config.to_yaml(),
            ENVIRONMENT_FILE: _json(self.environment),
            MANIFEST_FILE: _json(self.manifest),
        }

    def write(self, output_dir: Path) -> None:
        """Write the files."""
        if self.accelerator.is_main_process:
            for name, content in self.files.items():
                write_file(output_dir / name, content)

    def begin(self, output_dir: Path, step: int = 0, checkpoint: Path | None = None) -> None:
        """Write the files of a run that starts at `step`, from `checkpoint` if it goes on from one.

        `segments` of the manifest lists each start: when, on which host, from which step, and as `differs` what of the
        manifest was not as at the first start. A run that goes on in its folder keeps the rest of its first manifest.
        """
        segment = {name: self.manifest[name] for name in ("started", "host", "command")} | {"from_step": step}
        first = self.manifest
        if checkpoint is not None:
            segment["resumed_from"] = str(checkpoint)
            if is_checkpoint_of(checkpoint, output_dir):
                first = _first_manifest(output_dir, checkpoint)
                first.pop("final", None)
                segment["differs"] = {
                    name: value
                    for name, value in self.manifest.items()
                    if name not in segment and name != "segments" and value != first.get(name, value)
                }
        self.manifest = first | {"segments": [*first["segments"], segment]}
        self.write(output_dir)

    def end(self, step: int, reason: str | None, weights: dict[str, str] | None) -> None:
        """Note in the manifest where this start of the run ended, and why, and say so (of one that diverged, an error
        does).

        `weights`, the digests of the final weights, end the run: they are noted as `final`, with that of the loss
        trace."""
        output_dir = Path(self.config.train.output_dir)
        if not self.accelerator.is_main_process:
            return
        self.manifest["segments"][-1] |= {
            "ended": _now(),
            "to_step": step,
            "reason": "finished" if weights is not None else reason,
        }
        if weights is not None:
            trace = loss_trace_digest(output_dir / METRICS_FILE)
            self.manifest["final"] = {"global_step": step, "weights": weights, "loss_trace": trace}
        write_file(output_dir / MANIFEST_FILE, _json(self.manifest))
        if weights is not None:
            names = {LORA: "the trained adapters", PIPELINE: "the trained pipeline"}
            made = [f"{output_dir / name} holds {what}" for name, what in names.items() if (output_dir / name).is_dir()]
            made += [best] if (best := describe_best(output_dir)) else []
            print(f"Done: {', '.join(made)}")
        elif reason != DIVERGED:
            print(f"Stopped at step {step} by {reason}; --resume-from latest goes on")


def _first_manifest(output_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """That of the run's folder or, if it is gone or damaged, the checkpoint's copy, whose digest is verified."""
    try:
        return read_manifest(output_dir)
    except (OSError, ValueError) as error:
        warn(f"{output_dir / MANIFEST_FILE}: {one_line(error)}; going on with the copy in {checkpoint.name}")
        return read_manifest(checkpoint)


def describe_versions() -> dict[str, str]:
    """Python's version, and those of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_environment() -> dict[str, Any]:
    """The machine and all installed packages."""
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "packages": _packages(),
    }


@functools.cache  # to read them takes a third of a second
def _packages() -> dict[str, str]:
    found = [dist.metadata for dist in importlib.metadata.distributions()]
    packages = {metadata["Name"]: metadata["Version"] for metadata in found}
    return dict(sorted(packages.items(), key=lambda item: str(item[0]).lower()))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
