"""What the training loop costs beyond the bare step of its model, and where that goes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_train_step.py [--threads 1] [--block 5] [--repeats 30]
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_train_step.py --against CHECKOUT --turns 8 --repeats 6

Runs `main` of train_text_to_image.py with the quickstart's config, without evaluating and saving. After each block of
steps it is held, and the tensors that its denoiser saw in the block go through a bare step: forward, backward, clipping
and the same optimizer in plain PyTorch, for a denoiser of its own. Every second block has timers around the functions
that a step calls, for the table; the blocks between them give the overhead. All is wrapped where it is defined, before
the script imports it. Options that are not listed here go to the script.

With --against, this script and that of another checkout take turns, with the same options, in a process of their own
each: the overhead of both, and how much more it is here. Many turns of few blocks, because machines change
their pace.
"""

import argparse
import functools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerBase

from difftrain_utils import devices
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data import samples
from difftrain_utils.data.encoded import EncodedCache
from difftrain_utils.families import diffusers_family
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.media import image
from difftrain_utils.objective import loss, noise, timesteps
from difftrain_utils.objective.schedule import Schedule
from difftrain_utils.optimization import optimizers
from difftrain_utils.optimization.ema import EMA
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.run.interruptions import Interruptions
from difftrain_utils.run.machine import keep_freed_memory
from difftrain_utils.run.state import Totals
from difftrain_utils.run.tracking import Metrics

ROOT = Path(__file__).resolve().parent.parent
# What an uncached run cannot do without, whoever writes its loop
WORK = ("VAE", "text encoder", "EMA")
# (whose, functions, the line of the table), whose being None for the class of the config's family; the time of a
# function is without that of others here that it calls
PARTS = [
    (None, "predict", "forward"),
    (Accelerator, "backward", "backward"),
    (optimizers, "clip_gradients", "clip"),
    (AcceleratedOptimizer, "step zero_grad", "optimizer"),
    (None, "encode_images", "VAE"),
    (None, "encode_prompts", "text encoder"),
    (PreTrainedTokenizerBase, "__call__", "tokenizer"),
    (EMA, "step", "EMA"),
    (image, "read_image", "data: row, decoding"),
    (image, "crop_of resize_and_crop", "data: resize, crop, to tensor"),
    (EncodedCache, "__getitem__", "data: caches"),
    (samples.Samples, "__getitem__", "data: other"),
    (samples, "collate", "data: other"),
    (samples, "generator_for", "keyed generators: data"),
    (image, "generator_for", "keyed generators: data"),
    (timesteps, "generator_for", "keyed generators: timesteps"),
    (diffusers_family, "keyed_randn", "noise: drawing"),
    (noise, "sample_noise", "noise: drawing"),
    (timesteps, "sample_timesteps", "timesteps: other"),
    (devices, "seed_device", "seed of the model"),
    (noise, "perturb_input", "noisy latents, target, loss"),
    (Schedule, "add_noise target", "noisy latents, target, loss"),
    (loss, "sample_losses", "noisy latents, target, loss"),
    (torch.Tensor, "isfinite", "check of the gradient's norm"),
    (Totals, "add end_step take", "totals"),
    (Metrics, "log", "metrics.jsonl"),
    (AcceleratedScheduler, "step", "lr_scheduler"),
    (Interruptions, "poll", "poll"),
    (tqdm, "update", "progress bar"),
]


class Timers:
    """Seconds in named functions while `on`."""

    def __init__(self):
        self.on, self.seconds, self.inner = False, Counter(), []

    def watch(self, function, name):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if not self.on:
                return function(*args, **kwargs)
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] += elapsed - self.inner.pop()
                if self.inner:
                    self.inner[-1] += elapsed

        return timed

    def take(self) -> Counter:
        seconds, self.seconds = self.seconds, Counter()
        return seconds


class BareStep:
    """Forward, backward, clipping and optimizer step in plain PyTorch, for a denoiser of its own."""

    def __init__(self, family, config, timers):
        model = trained_models(family, config)["denoiser"]
        optimizer = build_optimizer(config.optimizer, {"denoiser": model})
        self.parameters = list(model.parameters())
        self.max_norm = config.train.max_grad_norm or math.inf
        self.forward = timers.watch(functools.partial(family.predict, model), "forward")
        self.backward = timers.watch(torch.Tensor.backward, "backward")
        self.clip = timers.watch(torch.nn.utils.clip_grad_norm_, "clip")
        self.step, self.zero_grad = (timers.watch(f, "optimizer") for f in (optimizer.step, optimizer.zero_grad))

    def __call__(self, inputs, target):
        self.backward(F.mse_loss(self.forward(*inputs), target))
        self.clip(self.parameters, self.max_norm)
        self.step()
        self.zero_grad()


def run_blocks(config) -> list[tuple[float, float, Counter, Counter]]:
    """Of each block the seconds of the script, of the bare steps, and in the parts of both."""
    keep_freed_memory()  # as in the script, before its denoiser is made
    timers, family = Timers(), load_family(config)
    bare_step = BareStep(family, config, timers)  # of the functions as they are
    family_class = type(family)
    for owner, names, part in PARTS:
        for name in names.split():
            setattr(owner or family_class, name, timers.watch(getattr(owner or family_class, name), part))
    predict, sample_losses = family_class.predict, loss.sample_losses
    iterate, log = DataLoaderShard.__iter__, Metrics.log
    inputs, steps, blocks = None, [], []  # of the denoiser's last call; inputs and targets of this block's steps

    def recorded_predict(family, denoiser, noisy_latents, timesteps, conditioning):
        nonlocal inputs
        inputs = noisy_latents, timesteps, conditioning
        return predict(family, denoiser, *inputs)

    def recorded_losses(config, schedule, output, target, timesteps, masks):
        steps.append((inputs, target))
        return sample_losses(config, schedule, output, target, timesteps, masks)

    def timed_iter(dataloader):
        batches = iterate(dataloader)
        fetch = timers.watch(lambda: next(batches, None), "data: loader")
        while (batch := fetch()) is not None:
            yield batch

    def end_block(metrics, step, values):
        """Metrics.log, the last thing that the script's step does here, and then the bare steps."""
        nonlocal start
        log(metrics, step, values)
        script_seconds, script_parts = time.perf_counter() - start, timers.take()
        start = time.perf_counter()
        for arguments in steps:
            bare_step(*arguments)
        blocks.append((script_seconds, time.perf_counter() - start, script_parts, timers.take()))
        steps.clear()
        timers.on = not timers.on
        start = time.perf_counter()

    family_class.predict, loss.sample_losses = recorded_predict, recorded_losses
    DataLoaderShard.__iter__, Metrics.log = timed_iter, end_block
    import train_text_to_image  # now that what it imports is wrapped

    start = time.perf_counter()
    train_text_to_image.main(config)
    return blocks


def measure(args, options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # fmt: off
        config = parse_config(TextToImageConfig, [
            "--config", "configs/quickstart.yaml", "--train.output_dir", f"{folder}/run",
            "--train.cpu_threads", str(args.threads), "--train.max_steps", str(args.block * (2 * args.repeats + 1)),
            "--train.log_every", str(args.block), "--train.eval_every", "0", "--train.save_every", "0", *options,
        ])
        # fmt: on
        blocks = run_blocks(config)

    def milliseconds(values) -> float:
        """The median over blocks, of a step."""
        return median(values) / args.block * 1e3

    timed, untimed = blocks[1::2], blocks[2::2]  # the first block warms up
    full, bare = (milliseconds([block[i] for block in untimed]) for i in (0, 1))
    low, ratio, high = quantiles([block[0] / block[1] for block in untimed], n=4)
    work = sum(milliseconds([block[2][part] for block in timed]) for part in WORK) / bare
    print(f"{args.threads} threads, medians of {args.repeats} blocks of {args.block} steps")
    print(f"script {full:.2f} ms a step, bare step {bare:.2f}")
    print(f"beyond the bare step: {ratio - 1:.1%} (quartiles {low - 1:.1%} and {high - 1:.1%})")
    print(f"beyond the bare step, {', '.join(WORK)} ({work:.1%}): {ratio - 1 - work:.1%}")
    print("\nms a step                        script     bare  difference, of the bare step")
    for block in timed:
        for seconds, parts in zip(block[:2], block[2:], strict=True):
            parts["rest"] = seconds - parts.total()
            parts["all, with timers"] = seconds
    for part in dict.fromkeys([*(part for _, _, part in PARTS), "data: loader", "rest", "all, with timers"]):
        ours, theirs = (milliseconds([block[i][part] for block in timed]) for i in (2, 3))
        print(f"{part:30} {ours:8.2f} {theirs:8.2f} {ours - theirs:8.2f} {(ours - theirs) / bare:8.2%}")


def overhead_of(checkout: Path, argv: list[str]) -> float:
    """What a checkout's benchmark says, in % of the bare step."""
    command = [sys.executable, "benchmarks/benchmark_train_step.py", *argv]
    environment = os.environ | {"PYTHONPATH": "."}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    found = re.search(r"^beyond the bare step: (\S+)% \(quartiles", result.stdout, re.MULTILINE)
    if result.returncode or not found:
        raise SystemExit(f"{' '.join(command)} failed in {checkout}:\n{result.stderr[-2000:]}")
    return float(found[1])


def compare(args, options) -> None:
    argv = ["--threads", args.threads, "--block", args.block, "--repeats", args.repeats, *options]
    argv, there, here = [str(arg) for arg in argv], [], []
    print(f"{args.threads} threads, {args.repeats} blocks of {args.block} steps a turn; % beyond the bare step")
    print(f"there: {args.against.resolve()}, here: {ROOT}\n\nturn     there     here  here - there")
    for turn in range(1, args.turns + 1):
        there.append(overhead_of(args.against, argv))
        here.append(overhead_of(ROOT, argv))
        print(f"{turn:4} {there[-1]:9.1f} {here[-1]:8.1f} {here[-1] - there[-1]:13.1f}", flush=True)
    differences = [b - a for a, b in zip(there, here, strict=True)]
    print()
    for name, values in (("there", there), ("here", here), ("here - there", differences)):
        low, middle, high = quantiles(values, n=4)
        print(f"{name}: {middle:.1f}% (quartiles {low:.1f}% and {high:.1f}%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block", type=int, default=5, help="steps at a time: few, as machines change their pace")
    parser.add_argument("--repeats", type=int, default=30, help="of a block with timers and one without")
    parser.add_argument("--against", type=Path, help="a checkout of another commit to compare with")
    parser.add_argument("--turns", type=int, default=8, help="of both, with --against: at least 2")
    args, options = parser.parse_known_args()
    if args.turns < 2:
        parser.error(f"--turns: must be at least 2, for quartiles, got {args.turns}")
    (compare if args.against else measure)(args, options)


if __name__ == "__main__":
    main()
