"""How much a validation loss jumps from evaluation to evaluation, with fixed and with fresh noise.

    accelerate launch train_text_to_image.py --config configs/quickstart.yaml --train.max_steps 400 \
        --train.save_every 10 --train.keep_checkpoints 0 --train.eval_every 0 --output-dir runs/validation-noise
    python benchmarks/validation_noise.py runs/validation-noise

Takes the EMA weights of the checkpoints in the second half of a run, and their validation loss twice: at the same
(noise, noise level) pairs each time, as training does, and at pairs that are drawn afresh each time. The images are the
same. The spread is the standard deviation of what a quadratic curve over the steps leaves.
"""

import argparse
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from safetensors.torch import load_file

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data.rows import map_rows, split_rows
from difftrain_utils.evaluation.validation import validation_losses
from difftrain_utils.families.load import load_family
from difftrain_utils.run.run_folder import list_checkpoints

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", type=Path)
run = parser.parse_args().run

config = parse_config(TextToImageConfig, ["--config", str(run / "config.resolved.yaml")])
accelerator, family = Accelerator(mixed_precision="no"), load_family(config)
_, validation_rows = split_rows(map_rows(config.data), config.data)
denoiser = family.load_denoiser().to(accelerator.device).eval()
family.move_frozen_parts(accelerator, config.train)

checkpoints = list_checkpoints(run)
steps, losses = [], {"fixed": [], "fresh": []}
for step, folder in checkpoints[len(checkpoints) // 2 :]:
    weights = load_file(folder / "ema.safetensors")
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(weights[str(i)])
    steps.append(step)
    for noise, seed in (("fixed", 0), ("fresh", step)):
        config.evaluation.seed = seed
        found = validation_losses(accelerator, family, denoiser, validation_rows, config)
        losses[noise].append(found.double().mean().item())
    print(f"step {step}: fixed {losses['fixed'][-1]:.5f}, fresh {losses['fresh'][-1]:.5f}", flush=True)

spread = {}
for noise, values in losses.items():
    residuals = np.array(values) - np.polyval(np.polyfit(steps, values, 2), steps)
    spread[noise] = np.sqrt((residuals**2).sum() / (len(steps) - 3))
    print(f"{noise} noise: mean {np.mean(values):.5f}, spread {spread[noise]:.6f} over {len(steps)} evaluations")
print(f"fresh / fixed: {spread['fresh'] / spread['fixed']:.1f}")
