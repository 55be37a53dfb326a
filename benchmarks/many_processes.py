"""What several processes cost: the script over a bare loop with DDP, and what each process holds with FSDP2.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/many_processes.py time [--processes 4] [--block 10] [--repeats 15]
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/many_processes.py memory [--processes 1 2 4]

`time`: the script with `train.shard` none and full, and a loop that has nothing but the model, DDP, AdamW, clipping and
an average, on latents and text that lie ready: what is more is drawing samples by their keys, reading the caches and
the meter. All train the quickstart's model with its batch on a CPU over gloo, and take turns, a block of steps each.

`memory`: bytes of a process's weights, gradients, optimizer state and averages after two steps of a transformer, as
its tensors count them, and how much more main memory of its own the process has than before it made them.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import socket
import tempfile
import time
from itertools import chain
from pathlib import Path
from statistics import median, quantiles

import psutil
import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel

import train_text_to_image
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.training import EmaConfig, TrainConfig
from difftrain_utils.families.load import load_family
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer, clip_gradients
from difftrain_utils.optimization.sharding import num_bytes
from difftrain_utils.run.manifest import Record
from difftrain_utils.run.state import TrainState
from difftrain_utils.run.tracking import Metrics


# ── Time ─────────────────────────────────────────────────────────────────────────────────────────────────────
def bare_loop(config, end_block) -> None:
    """What no loop with DDP can do without."""
    accelerator = Accelerator()
    family = load_family(config)
    denoiser = family.load_denoiser().train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4)
    family.move_frozen_parts(accelerator, config.train)
    average = [parameter.detach().clone() for parameter in denoiser.parameters()]
    size = config.train.batch_size // accelerator.num_processes
    latents, conditioning = torch.randn(size, 4, 8, 8), family.encode_prompts(["a red circle"] * size)
    denoiser = torch.nn.parallel.DistributedDataParallel(denoiser)
    for step in range(1, config.train.max_steps + 1):
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (size,))
        noisy_latents = family.schedule.add_noise(latents, noise, timesteps)
        output = family.predict(denoiser, noisy_latents, timesteps, conditioning)
        loss = (output - family.schedule.target(latents, noise, timesteps)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(denoiser.parameters()), 0.01)
        end_block(step)


def script_loop(config, end_block) -> None:
    log = Metrics.log

    def log_and_end_block(metrics, step, values):  # the last thing that a step does, without evaluating and saving
        log(metrics, step, values)
        end_block(step)

    Metrics.log = log_and_end_block
    train_text_to_image.main(config)


def train(loop, config, block: int, environment: dict[str, str], connection) -> None:
    """In a process of its own: train a block, report its seconds, and wait for the word to go on."""
    os.environ |= environment
    torch.set_num_threads(1)
    start = time.perf_counter()

    def end_block(step: int) -> None:
        nonlocal start
        if step % block == 0:
            connection.send(time.perf_counter() - start)
            connection.recv()
            start = time.perf_counter()

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        connection.recv()
        loop(config, end_block)


def start(target, number: int, *arguments) -> list:
    """The connections to `number` processes that find each other, running `target(*arguments, environment, end)`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    spawn, connections = multiprocessing.get_context("spawn"), []
    for rank in range(number):
        connection, end = spawn.Pipe()
        own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}
        spawn.Process(target=target, args=(*arguments, own, end), daemon=True).start()
        end.close()  # so that a process that dies is noticed
        connections.append(connection)
    return connections


def measure_time(args: argparse.Namespace) -> None:
    (number,) = args.processes or [4]
    with tempfile.TemporaryDirectory() as folder:
        groups, seconds = {}, {}
        for name, loop, shard in (
            ("bare loop", bare_loop, "none"),
            ("script", script_loop, "none"),
            ("script, sharded", script_loop, "full"),
        ):
            # fmt: off
            config = parse_config(TextToImageConfig, [
                "--config", "configs/quickstart.yaml", "--train.output_dir", str(Path(folder, name)),
                "--train.cpu_threads", "1", "--train.max_steps", str(args.block * (args.repeats + 1)),
                "--train.log_every", str(args.block), "--train.eval_every", "0", "--train.save_every", "0",
                "--train.batch_size", str(args.batch), "--train.shard", shard,
            ])
            # fmt: on
            groups[name], seconds[name] = start(train, number, loop, config, args.block), []
        for repeat in range(args.repeats + 1):
            for name, connections in groups.items():
                for connection in connections:
                    connection.send("go on")
                took = max(connection.recv() for connection in connections)
                if repeat:  # the first block warms up
                    seconds[name].append(took / args.block)
        for connection in chain.from_iterable(groups.values()):
            connection.send("go on")  # to the end
        for process in multiprocessing.active_children():
            process.join()
    print(f"{number} processes, batch of {args.batch}, medians of {args.repeats} blocks of {args.block} steps")
    for name, values in seconds.items():
        pairs = [ours / bare for ours, bare in zip(values, seconds["bare loop"], strict=True)]
        low, ratio, high = quantiles(pairs, n=4)
        print(f"{name:<16} {1000 * median(values):7.1f} ms a step, {ratio:.3f} of bare ({low:.3f} to {high:.3f})")


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────
def hold(shard: str, folder: str, environment: dict[str, str], connection) -> None:
    """In a process of its own: two steps, and what it then holds."""
    os.environ |= environment
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        accelerator = Accelerator(cpu=True)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(torch.zeros(1))
        config = TextToImageConfig(
            ModelConfig("m"), DataConfig("d"), TrainConfig(output_dir=folder, shard=shard), ema=EmaConfig()
        )
        before = psutil.Process().memory_full_info().uss
        denoiser = DiTTransformer2DModel(
            num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=24, sample_size=8
        )
        optimizer = build_optimizer(config.optimizer, {"denoiser": denoiser})
        lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
        record = Record(config, accelerator, "transformer", {}, {})
        state = TrainState(accelerator, {"denoiser": denoiser}, optimizer, lr_scheduler, record, config.train)
        parameters = list(denoiser.parameters())
        state.averages = build_averages(config.ema, parameters)
        for _ in range(2):
            state.optimizer.zero_grad()
            inputs = torch.randn(1, 4, 8, 8), torch.zeros(1).long(), torch.zeros(1).long()
            state.models["denoiser"](*inputs).sample.square().mean().backward()
            clip_gradients(accelerator, state.optimizer, {"denoiser": 1.0})
            state.optimizer.step()
            state.averages["ema"].step(parameters, 1)
        held = {
            "weights": num_bytes(parameters),
            "gradients": num_bytes(p.grad for p in parameters if p.grad is not None),
            "optimizer state": num_bytes(
                v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)
            ),
            "averages": num_bytes(state.averages["ema"].averages),
        }
        gc.collect()
        held["main memory"] = psutil.Process().memory_full_info().uss - before
    connection.send(held)
    connection.recv()


def measure_memory(args: argparse.Namespace) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, so that it does not count
    whole = None
    for number in args.processes or [1, 2, 4]:
        for shard in ("none", "full") if number > 1 else ("none",):
            with tempfile.TemporaryDirectory() as folder:
                connections = start(hold, number, shard, folder)
                held = [connection.recv() for connection in connections]
                for connection in connections:
                    connection.send("go")
            most = {name: max(of_process[name] for of_process in held) for name in held[0]}
            main_memory = most.pop("main memory")
            total = sum(most.values())
            whole = whole or total
            said = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in most.items())
            print(
                f"{number} processes, train.shard {shard}: {total / 1e6:.1f} MB ({total / whole:.3f}), {said}; "
                f"main memory {main_memory / 1e6:.0f} MB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", type=int, default=10, help="steps at a time")
    parser.add_argument("--repeats", type=int, default=15, help="blocks of each, after a first one")
    args = parser.parse_args()
    {"time": measure_time, "memory": measure_memory}[args.what](args)


if __name__ == "__main__":
    main()
