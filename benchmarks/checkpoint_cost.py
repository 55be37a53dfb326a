"""What a checkpoint that cannot be lost costs over a bare `save_state`.

    python benchmarks/checkpoint_cost.py [--folder FOLDER] [--width 192] [--repeats 5]

Saves a UNet with AdamW by accelerate's `save_state`, reads the files back once, and saves it with `save_checkpoint`
(written aside, synced to the disk, digests taken, renamed), in turns. Without EMA weights, which `save_state` has not.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from difftrain_utils.files import find_damage
from difftrain_utils.optimization.trained import saved_state
from difftrain_utils.run.checkpoints import Checkpoint
from difftrain_utils.run.run_folder import OPTIMIZER_FILE, STATE_FILE
from difftrain_utils.trees import to_json

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--folder", type=Path, help="where to write, as the disk matters (default: a temporary folder)")
parser.add_argument("--width", type=int, default=192, help="a multiple of 16")
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

accelerator = Accelerator()
model = UNet2DModel(
    sample_size=32,
    block_out_channels=tuple(factor * args.width for factor in (1, 2, 2, 4)),
    down_block_types=("DownBlock2D",) * 4,
    up_block_types=("UpBlock2D",) * 4,
    norm_num_groups=16,
)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()

own = Accelerator(cpu=True)  # which saves neither model nor optimizer by itself
folder = Path(tempfile.mkdtemp(dir=args.folder))
seconds = {"save_state": [], "read": [], "save_checkpoint": [], "verify": []}


def timed(name: str, function, *arguments) -> None:
    start = time.perf_counter()
    function(*arguments)
    seconds[name].append(time.perf_counter() - start)


def read(path: Path) -> None:
    buffer = bytearray(1 << 22)
    for file in path.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def save_checkpoint(step: int) -> None:
    parts = {"denoiser": saved_state(model), "optimizer": {}}
    state = {"global_step": step}
    documents = {
        STATE_FILE: json.dumps(state),
        OPTIMIZER_FILE: json.dumps(to_json(optimizer.state_dict(), parts["optimizer"])),
    }
    Checkpoint(own, folder, step, documents, parts).finish(keep=0, required=True)


try:
    for step in range(args.repeats + 1):
        timed("save_state", accelerator.save_state, str(folder / "bare"))
        timed("read", read, folder / "bare")
        size = sum(file.stat().st_size for file in (folder / "bare").iterdir())
        shutil.rmtree(folder / "bare")
        timed("save_checkpoint", save_checkpoint, step)
        timed("verify", find_damage, folder / f"checkpoint-{step}")
        shutil.rmtree(folder / f"checkpoint-{step}")
finally:
    shutil.rmtree(folder)

median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
print(f"{size / 1e6:.0f} MB, medians of {args.repeats}: " + ", ".join(f"{n} {s:.3f} s" for n, s in median.items()))
for what in ("read", "verify"):  # verify reads the bytes and takes their digests
    ratio = (median["save_checkpoint"] - median[what]) / median["save_state"]
    print(f"(save_checkpoint - {what}) / save_state: {ratio:.2f}")
