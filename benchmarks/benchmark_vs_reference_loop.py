"""How fast train_text_to_image.py trains, over a plain loop in the manner of diffusers' text-to-image example.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/benchmark_vs_reference_loop.py [--threads 2] [--workers 0]

Both train the quickstart's model on the same folder of images, with its batch size, precision, learning rate and EMA,
in a process each. They take turns, a block of steps each: while one trains, the other waits. Short blocks, because
machines change their pace; with workers longer ones (--block 50 --repeats 5), because these fetch on while their loop
waits. What a loop does once (starting, saving, evaluating) does not count. Options that are not listed here go to the
script.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from tqdm.auto import tqdm

import train_text_to_image
from difftrain_utils.commands import draw_shapes
from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import MIXED_PRECISION
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.families.load import load_family
from difftrain_utils.run.tracking import Metrics


def reference_loop(config, end_block):
    """What examples/text_to_image/train_text_to_image.py of diffusers does by default; `end_block` ends each block."""
    accelerator = Accelerator(mixed_precision=MIXED_PRECISION[config.train.precision])
    set_seed(config.train.seed)
    family, size = load_family(config), config.data.resolution
    family.move_frozen_parts(accelerator, config.train)
    unet, weight_dtype = family.load_denoiser(), family.weight_dtype
    vae, text_encoder, tokenizer = (family.part(name) for name in ("vae", "text_encoder", "tokenizer"))
    noise_scheduler = DDPMScheduler.from_config(family.sampler.config)
    ema_unet = EMAModel(unet.parameters(), decay=config.ema.decay)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.optimizer.init_args["lr"], weight_decay=0.0)

    def transform(image):
        scale = size / min(image.size)
        image = image.resize([round(edge * scale) for edge in image.size], Image.Resampling.BILINEAR)
        left, top = (random.randint(0, edge - size) for edge in image.size)
        image = image.crop((left, top, left + size, top + size))
        if config.data.random_flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (pixel_values - 0.5) / 0.5

    def preprocess(examples):
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        examples["input_ids"] = tokenizer(
            examples["text"], max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return examples

    def collate(examples):
        return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "input_ids")}

    dataset = datasets.load_dataset("imagefolder", data_dir=config.data.dataset, split="train")
    train_dataloader = torch.utils.data.DataLoader(
        dataset.with_transform(preprocess), shuffle=True, collate_fn=collate, batch_size=config.train.batch_size,
        num_workers=config.data.num_workers, drop_last=True,  # the example trains on the epoch's rest, too
    )  # fmt: skip
    lr_scheduler = get_scheduler(
        config.lr_scheduler.name,
        optimizer,
        num_warmup_steps=config.lr_scheduler.num_warmup_steps,
        num_training_steps=config.train.max_steps,
    )
    unet.train()
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    ema_unet.to(accelerator.device)
    global_step = 0
    progress_bar = tqdm(total=config.train.max_steps, desc="Steps")
    while True:
        for batch in train_dataloader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                num_timesteps = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, num_timesteps, (len(latents),), device=latents.device)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
                encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
                if noise_scheduler.config.prediction_type == "epsilon":
                    target = noise
                elif noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                train_loss = accelerator.gather(loss.repeat(config.train.batch_size)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(unet.parameters(), config.train.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema_unet.step(unet.parameters())
            progress_bar.update(1)
            global_step += 1
            accelerator.log({"train_loss": train_loss}, step=global_step)
            progress_bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            end_block(global_step, train_loss)
            if global_step == config.train.max_steps:
                return


def script_loop(config, end_block):
    log = Metrics.log

    def log_and_end_block(metrics, step, values):  # the last thing that a step does, without evaluating and saving
        log(metrics, step, values)
        end_block(step, values["loss"])

    Metrics.log = log_and_end_block
    train_text_to_image.main(config)


def train(loop, config, block, connection):
    """In a process of its own: train a block, report its seconds and last loss, and wait for the word to go on."""
    multiprocessing.set_start_method("fork", force=True)  # the data loader's default, which a spawned process loses
    torch.set_num_threads(config.train.cpu_threads)
    start = time.perf_counter()

    def end_block(step, loss):
        nonlocal start
        if step % block == 0:
            connection.send((time.perf_counter() - start, loss))
            connection.recv()
            start = time.perf_counter()

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        connection.recv()
        loop(config, end_block)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--block", type=int, default=10, help="steps at a time")
    parser.add_argument("--repeats", type=int, default=25, help="blocks of each, after a first one")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # for the processes to come
        data = Path(folder, "shapes")
        draw_shapes.main(["--output-dir", str(data), "--num-images", "1800", "--image-size", "32"])
        max_steps = args.block * (args.repeats + 1)
        # fmt: off
        config = parse_config(TextToImageConfig, [
            "--config", "configs/quickstart.yaml", "--data.dataset", str(data), "--data.validation_split", "0",
            "--data.num_workers", str(args.workers), "--train.output_dir", f"{folder}/run",
            "--train.cpu_threads", str(args.threads), "--train.max_steps", str(max_steps),
            "--train.log_every", str(args.block), "--train.eval_every", "0", "--train.save_every", "0",
            "--evaluation.shapes_judge", "false", *options,
        ])
        # fmt: on
        spawn = multiprocessing.get_context("spawn")
        connections, processes, rates, losses = {}, [], {}, {}
        for name, loop in (("script", script_loop), ("reference", reference_loop)):
            connections[name], end = spawn.Pipe()
            processes.append(spawn.Process(target=train, args=(loop, config, args.block, end)))
            processes[-1].start()
            end.close()  # so that a process that dies is noticed
            rates[name] = []
        try:
            for repeat in range(args.repeats + 1):
                for name, connection in connections.items():
                    connection.send("go on")
                    seconds, losses[name] = connection.recv()
                    if repeat:  # the first block warms up
                        rates[name].append(args.block / seconds)
            for connection in connections.values():
                connection.send("go on")
        except EOFError:
            raise SystemExit(f"{name} failed: see above") from None
        finally:  # and whoever still waits ends
            for connection, process in zip(connections.values(), processes, strict=True):
                connection.close()
                process.join()
    pairs = zip(rates["script"], rates["reference"], strict=True)
    low, ratio, high = quantiles([ours / theirs for ours, theirs in pairs], n=4)
    print(f"{args.threads} threads, {args.workers} workers, medians of {args.repeats} blocks of {args.block} steps")
    for name in rates:
        print(f"{name}: {median(rates[name]):.2f} steps/s, last loss {losses[name]:.3f}")
    print(f"script over reference: {ratio:.3f} times (quartiles {low:.3f} and {high:.3f})")


if __name__ == "__main__":
    main()
