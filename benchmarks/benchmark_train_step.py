"""What the training loop costs beyond the bare step of its model, and where that goes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_train_step.py [--threads 1] [--block 5] [--repeats 30]

Runs `main` of train_text_to_image.py with the quickstart's config, without evaluating and saving. After each block of
steps it is held, and the tensors that its denoiser saw in the block go through a bare step: forward, backward, clipping
and the same optimizer in plain PyTorch, for a copy of the denoiser. Every second block has timers around the script's
functions, for the table; the blocks between them give the overhead. Options that are not listed here go to the script.
"""

import argparse
import copy
import functools
import math
import tempfile
import time
from collections import Counter
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerBase

import train_text_to_image as script
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.data import samples
from difftrain_utils.data.encoded import EncodedCache
from difftrain_utils.families.denoiser import configure_denoiser
from difftrain_utils.families.stable_diffusion import StableDiffusion
from difftrain_utils.objective import timesteps
from difftrain_utils.optimization.optimizers import build_optimizer

# What an uncached run cannot do without, whoever writes its loop
WORK = ("VAE", "text encoder", "EMA")
# (whose, functions, the line of the table); the time of a function is without that of others here that it calls
PARTS = [
    (StableDiffusion, "predict", "forward"),
    (script.Accelerator, "backward", "backward"),
    (script.Accelerator, "clip_grad_norm_", "clip"),
    (AcceleratedOptimizer, "step zero_grad", "optimizer"),
    (StableDiffusion, "encode_images", "VAE"),
    (StableDiffusion, "encode_prompts", "text encoder"),
    (PreTrainedTokenizerBase, "__call__", "tokenizer"),
    (script.EMA, "step", "EMA"),
    (samples, "read_row", "data: row, decoding"),
    (samples, "resize_and_crop", "data: resize, crop, to tensor"),
    (EncodedCache, "__getitem__", "data: caches"),
    (script.Samples, "__getitem__", "data: other"),
    (script, "collate", "data: other"),
    (samples, "generator_for", "keyed generators: data"),
    (timesteps, "generator_for", "keyed generators: timesteps"),
    (script, "keyed_randn sample_noise", "noise: drawing"),
    (script, "sample_timesteps", "timesteps: other"),
    (script, "seed_for seed_device", "seed of the model"),
    (script, "perturb_input add_noise get_target elementwise_loss loss_weights", "noisy latents, target, loss"),
    (torch.Tensor, "isfinite", "check of the gradient's norm"),
    (script.Totals, "add end_step take", "totals"),
    (script.Metrics, "log", "metrics.jsonl"),
    (AcceleratedScheduler, "step", "lr_scheduler"),
    (script.Interruptions, "poll", "poll"),
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
    """Forward, backward, clipping and optimizer step in plain PyTorch, for a copy of the family's denoiser."""

    def __init__(self, family, config):
        model = copy.deepcopy(family.denoiser).train()
        configure_denoiser(config.train, model)
        optimizer = build_optimizer(config.optimizer, model.parameters())
        self.parameters = list(model.parameters())
        self.max_norm = config.train.max_grad_norm or math.inf
        self.forward, self.backward = timers.watch(model, "forward"), timers.watch(torch.Tensor.backward, "backward")
        self.clip = timers.watch(torch.nn.utils.clip_grad_norm_, "clip")
        self.step, self.zero_grad = (timers.watch(f, "optimizer") for f in (optimizer.step, optimizer.zero_grad))

    def __call__(self, inputs, target):
        self.backward(F.mse_loss(self.forward(*inputs).sample, target))
        self.clip(self.parameters, self.max_norm)
        self.step()
        self.zero_grad()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--block", type=int, default=5, help="steps at a time: few, for machines change their pace")
parser.add_argument("--repeats", type=int, default=30, help="of a block with timers and one without")
args, options = parser.parse_known_args()
folder = tempfile.TemporaryDirectory()
# fmt: off
config = parse_config(TextToImageConfig, [
    "--config", "configs/quickstart.yaml", "--train.output_dir", f"{folder.name}/run",
    "--train.cpu_threads", str(args.threads), "--train.max_steps", str(args.block * (2 * args.repeats + 1)),
    "--train.log_every", str(args.block), "--train.eval_every", "0", "--train.save_every", "0", *options,
])
# fmt: on

timers, bare_steps = Timers(), []
inputs, targets = [], []  # of the denoiser and of the loss, in this block
blocks = []  # of each: seconds of the script, of the bare steps, and in the parts of both
for owner, names, part in PARTS:
    for name in names.split():
        setattr(owner, name, timers.watch(getattr(owner, name), part))
load_family, predict, elementwise_loss = script.load_family, StableDiffusion.predict, script.elementwise_loss
iterate, log = DataLoaderShard.__iter__, script.Metrics.log


def load_family_and_copy(config):
    family = load_family(config)
    bare_steps.append(BareStep(family, config))
    return family


def recorded_predict(family, denoiser, noisy_latents, timesteps, conditioning):
    inputs.append((noisy_latents, timesteps, conditioning))
    return predict(family, denoiser, noisy_latents, timesteps, conditioning)


def recorded_loss(config, noise_scheduler, model_pred, target, timesteps):
    targets.append(target)
    return elementwise_loss(config, noise_scheduler, model_pred, target, timesteps)


def timed_iter(dataloader):
    batches = iterate(dataloader)
    fetch = timers.watch(lambda: next(batches, None), "data: loader")
    while (batch := fetch()) is not None:
        yield batch


def end_block(metrics, step, values):
    """Metrics.log, the last thing that the script's step does here, and then the bare steps."""
    log(metrics, step, values)
    script_seconds, script_parts = time.perf_counter() - end_block.start, timers.take()
    start = time.perf_counter()
    for arguments in zip(inputs, targets, strict=True):
        bare_steps[0](*arguments)
    blocks.append((script_seconds, time.perf_counter() - start, script_parts, timers.take()))
    inputs.clear()
    targets.clear()
    timers.on = not timers.on
    end_block.start = time.perf_counter()


script.load_family, StableDiffusion.predict = load_family_and_copy, recorded_predict
script.elementwise_loss, script.Metrics.log, DataLoaderShard.__iter__ = recorded_loss, end_block, timed_iter
end_block.start = time.perf_counter()
script.main(config)


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
