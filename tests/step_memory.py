"""Print the bytes of main memory that a process has at most in a step. The options are those of the script; all comes
from caches, so that the frozen parts are not in memory."""

import sys
from types import SimpleNamespace

import torch
from helpers import parse_config
from torch.profiler import ProfilerActivity, profile

from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer
from difftrain_utils.optimization.sharding import num_bytes, reshard
from difftrain_utils.optimization.trained import trained_parameters
from difftrain_utils.run.launch import launch
from difftrain_utils.run.state import TrainState


def main() -> None:
    config = parse_config(sys.argv[1:])
    accelerator, family = launch(config), load_family(config)
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, 2)
    parts, size = config.train.gradient_accumulation_steps, config.data.resolution
    count = config.train.batch_size // (accelerator.num_processes * parts)
    latents = family.encode_images(torch.zeros(count, 3, size, size))[:, 0]
    conditioning = family.encode_prompts([None] * count)
    timesteps = torch.full((count,), 500.0 if family.schedule.has_continuous_time else 500)
    state = TrainState(accelerator, models, optimizer, lr_scheduler, SimpleNamespace(config=config), config.train)
    denoiser = state.models["denoiser"]
    parameters = trained_parameters(denoiser)
    averages = build_averages(config.ema, parameters).values()

    def step() -> None:
        for _ in range(parts):
            with accelerator.accumulate(denoiser), accelerator.autocast():
                output = family.predict(denoiser, latents, timesteps, conditioning)
                accelerator.backward(output.square().mean())
                del output
        state.optimizer.step()
        state.optimizer.zero_grad()
        for average in averages:
            average.step(parameters, 1)

    step()  # from now on there is the optimizer's state
    reshard(denoiser)
    states = (value for of_one in optimizer.state.values() for value in of_one.values() if torch.is_tensor(value))
    held = num_bytes([*denoiser.parameters(), *states])
    held += sum(num_bytes(average.state_tensors().values()) for average in averages)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    more, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        more += event.nbytes()
        most = max(most, more)
    if accelerator.is_main_process:
        print(held + most)


if __name__ == "__main__":
    main()
