"""Print the bytes of main memory that a process has at most in a step, as JSON. The options are those of the script; all
comes from caches, and the frozen parts are not in memory."""

import json
import sys
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from helpers import parse_config
from torch.profiler import ProfilerActivity, profile, record_function

from difftrain_utils.config.config import Config
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
from difftrain_utils.optimization.trained import trained_parameters
from difftrain_utils.run.launch import launch
from difftrain_utils.run.state import TrainState

STEP = "the measured step"


def main() -> None:
    config = parse_config(sys.argv[1:])
    accelerator = launch(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(accelerator, config)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == STEP)
    size, most = 0, 0
    for event in events:
        if event.name() == "[memory]":
            size += event.nbytes()
            most = max(most, size) if event.start_ns() > begin else 0
    if accelerator.is_main_process:
        print(json.dumps(most))


def train(accelerator: Accelerator, config: Config) -> None:
    """Three steps, of which the last one is called `STEP`, without what comes from caches or is drawn."""
    family = load_family(config)
    count = config.train.batch_size // (accelerator.num_processes * config.train.gradient_accumulation_steps)
    latents = family.encode_images(torch.zeros(count, 3, *[config.data.resolution] * 2))[:, 0]
    conditioning = family.encode_prompts([None] * count)
    timesteps = torch.full((count,), 500.0 if family.schedule.has_continuous_time else 500)
    family.free_cached()
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, 3)
    state = TrainState(accelerator, models, optimizer, lr_scheduler, SimpleNamespace(config=config), config.train)
    parameters, denoiser = trained_parameters(*state.models.values()), state.models["denoiser"]
    averages = build_averages(config.ema, parameters).values()
    for number in range(3):
        with record_function(STEP if number == 2 else "before"):
            for _ in range(config.train.gradient_accumulation_steps):
                with accelerator.accumulate(denoiser), accelerator.autocast():
                    output = family.predict(denoiser, latents, timesteps, conditioning)
                    accelerator.backward(output.square().mean())
                    del output
            state.optimizer.step()
            state.optimizer.zero_grad()
            for average in averages:
                average.step(parameters, number + 1)


if __name__ == "__main__":
    main()
