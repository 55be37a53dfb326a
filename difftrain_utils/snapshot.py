"""What a run was: its config, code, machine, base model and data, written before its first step."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from difftrain_utils.config import Config

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "datasets", "safetensors", "numpy", "pillow")
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
)


def take_snapshot(
    config: Config, accelerator: Accelerator, modules: dict[str, torch.nn.Module], data: dict[str, Any]
) -> dict[str, str]:
    """The contents of `config.resolved.yaml`, `env.json` and `run_manifest.json`, by file name.

    `modules` are those of the base model, before training; `data` is what `inspect_splits` returned.
    """
    manifest = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": describe_git(Path(sys.argv[0]).resolve().parent),
        "versions": {"python": platform.python_version(), **_versions(PACKAGES)},
        "seed": config.train.seed,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "device": _device_name(accelerator.device),
        "base_model": {
            "name": config.model.pretrained_model_name_or_path,
            "revision": config.model.revision,
            "sha256": {name: weights_digest(module) for name, module in modules.items()},
        },
        "data": data,
    }
    return {
        "config.resolved.yaml": config.to_yaml(),
        "env.json": _json(describe_environment()),
        "run_manifest.json": _json(manifest),
    }


def write_snapshot(output_dir: Path, snapshot: dict[str, str]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in snapshot.items():
        (output_dir / name).write_text(content, encoding="utf-8")


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_git(folder: Path) -> dict[str, Any] | None:
    """The commit of the checkout around `folder`, and how the working tree differs; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", check=True
        ).stdout

    try:
        status = git("status", "--porcelain")
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(status), "diff": git("diff", "HEAD")}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_environment() -> dict[str, Any]:
    """The machine and all installed packages."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
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
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }


def set_deterministic() -> None:
    """Let torch use deterministic algorithms only. Call it before CUDA starts: cuBLAS reads its variable then."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
