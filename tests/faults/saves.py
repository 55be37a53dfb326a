"""Run with faults.so preloaded: python saves.py FOLDER ERROR [EVERY]

Saves a checkpoint, then fails each file operation of the next save in turn (or every EVERY-th): the first checkpoint
has to stay intact, and no half one may be found. Prints how many of these saves failed.
"""

import contextlib
import ctypes
import io
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import EmaConfig, TrainConfig
from difftrain_utils.errors import RunError
from difftrain_utils.files import find_damage
from difftrain_utils.objective.loss import LearnedUncertainty
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.run_folder import list_checkpoints
from difftrain_utils.run.state import TrainState

folder, error, every = Path(sys.argv[1]), int(sys.argv[2]), int((*sys.argv, 1)[3])
faults = ctypes.CDLL(None)
faults.fault_count.restype = ctypes.c_long
faults.fault_at.argtypes = [ctypes.c_long, ctypes.c_int]

accelerator = Accelerator(cpu=True)
model = UNet2DModel(
    sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    norm_num_groups=4, layers_per_block=1,
)  # fmt: skip
config = TextToImageConfig(
    ModelConfig("m"), DataConfig("d"), TrainConfig(output_dir=str(folder)), ema=EmaConfig(power_sigma_rels=[0.1])
)
models = {"denoiser": model, "uncertainty": LearnedUncertainty()}
optimizer = build_optimizer(config.optimizer, models)
lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
record = Record(config, accelerator, "unet", {}, {})
state = TrainState(accelerator, models, optimizer, lr_scheduler, record, config.train)
state.averages = build_averages(config.ema, model.parameters())
model(torch.zeros(1, 3, 8, 8), 0).sample.sum().backward()
state.optimizer.step()


def save(step: int, required: bool = False) -> str:
    state.step = step
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        state.save(required)
    return printed.getvalue()


failed = 0
faults.fault_at(-1, 0)
assert save(1) == ""
operations = faults.fault_count()
for n in range(1, operations + 1, every):
    faults.fault_at(n, error)
    printed = save(2)
    faults.fault_at(-1, 0)
    assert find_damage(folder / "checkpoint-1") is None, n
    if printed:
        assert "warning: cannot save" in printed and "the newest checkpoint is checkpoint-1" in printed, (n, printed)
        assert [path.name for _, path in list_checkpoints(folder)] == ["checkpoint-1"], n
    else:  # a folder that could not be made because it was there
        assert find_damage(folder / "checkpoint-2") is None, n
        shutil.rmtree(folder / "checkpoint-2")
    failed += bool(printed)
assert save(2) == "" and find_damage(folder / "checkpoint-2") is None
faults.fault_at(1, error)
try:
    save(3, required=True)
except RunError as reported:
    assert "cannot save" in str(reported) and "the newest checkpoint is checkpoint-2" in str(reported)
else:
    raise AssertionError("a save that is required failed, and nothing was reported")
print(f"{failed} saves failed, of {len(range(1, operations + 1, every))}; {operations} operations in a save")
