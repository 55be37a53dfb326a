"""Start the training script on all GPUs of this machine, or on its CPU, without asking how.

    difftrain train --config configs/quickstart.yaml

Takes the options of a training script, and starts the one in this folder whose they are. Where `accelerate config` has
said how to launch, it is `accelerate launch`, which starts as that says; else a process for each GPU, or one on a CPU,
with all its cores. The command is printed first.
"""

import os
import shlex
import sys
from pathlib import Path

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.scripts import SCRIPTS, script_for
from difftrain_utils.errors import InputError
from difftrain_utils.files import local_path


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[2:] if argv is None else argv
    script = script_for(argv)
    parse_config(SCRIPTS[script], argv, prog="difftrain train", about=__doc__)  # so that a typo is reported at once
    if not Path(script).is_file():
        raise InputError(f"difftrain train: no {script} in this folder; `difftrain init FOLDER` makes one")
    command = launch_command(num_gpus(), has_accelerate_config())
    print("Starting", shlex.join([*command, script, *argv]), flush=True)
    os.execv(sys.executable, [sys.executable, *command[1:], script, *argv])


def launch_command(num_gpus: int, is_configured: bool) -> list[str]:
    """What starts a script on so many GPUs, or as accelerate is configured."""
    if is_configured:
        return ["python", "-m", "accelerate.commands.launch"]
    if num_gpus > 1:
        return ["python", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_gpus}"]
    return ["python"]


def num_gpus() -> int:
    """NVIDIA GPUs that a process would see. Torch would say it, but takes seconds to be imported."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        return (names.index("-1") if "-1" in names else len(names)) if visible else 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def has_accelerate_config() -> bool:
    """Whether there is the file that `accelerate config` writes."""
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    folder = local_path(cache) / "accelerate"
    return any((folder / f"default_config.{ending}").is_file() for ending in ("yaml", "yml", "json"))
