"""Train a text-to-image latent diffusion model.

    accelerate launch train_text_to_image.py --config configs/quickstart.yaml
    accelerate launch train_text_to_image.py --config configs/quickstart.yaml --resume-from latest
    accelerate launch train_text_to_image.py --help

This file is the whole run, in the order it happens: copy it and change it. Formulas and file formats are in
difftrain_utils. The one idea to know: sample k of a run (its image, crop, caption, noise and timestep) is a
function of (config, seed, k), and optimizer step s takes the samples [s·G, (s+1)·G), G = train.batch_size. So
a run can be stopped and resumed anywhere, or split over other numbers of processes, and sees the same samples.
"""

from difftrain_utils.config import MIXED_PRECISION, parse_config
from difftrain_utils.errors import InputError, blame, one_line_errors

if __name__ == "__main__":  # before the slow imports, so that a typo is told at once
    with one_line_errors():
        config = parse_config()

import math
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, tqdm
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from difftrain_utils.checkpoints import delete_run, find_checkpoint, load_checkpoint, replace_folder, save_checkpoint
from difftrain_utils.data import inspect_splits, load_data, split_data
from difftrain_utils.dream import rectify_noise
from difftrain_utils.evaluation import evaluation_weights, generate, save_grid, validation_loss
from difftrain_utils.families import load_family
from difftrain_utils.keyed_random import keyed_rand, keyed_randn, seed_for
from difftrain_utils.launch import check_launch
from difftrain_utils.loss import LearnedUncertainty, elementwise_loss, loss_weights
from difftrain_utils.noise import perturb_input, sample_noise
from difftrain_utils.objectives import add_noise, append_dims, compute_snr, get_target
from difftrain_utils.optimizers import build_optimizer
from difftrain_utils.power_ema import PowerEMA
from difftrain_utils.samples import Samples, collate
from difftrain_utils.shapes import count_right
from difftrain_utils.snapshot import set_deterministic, take_snapshot, write_snapshot
from difftrain_utils.timesteps import sample_timesteps
from difftrain_utils.tracking import Metrics, check_trackers


def main(config):
    seed, output_dir = config.train.seed, Path(config.train.output_dir)

    # ── The machine ──────────────────────────────────────────────────────────────────────────────────────────
    if config.train.deterministic:
        set_deterministic()
    if config.train.cpu_threads:
        torch.set_num_threads(config.train.cpu_threads)
    trackers = check_trackers(config.train.report_to)
    with blame("train.precision", ValueError):  # what this device cannot do
        accelerator = Accelerator(
            mixed_precision=MIXED_PRECISION[config.train.precision],
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                config.train.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            step_scheduler_with_optimizer=False,  # the learning rate is a function of the step alone
            log_with=trackers or None,
            project_dir=output_dir / "logs",
        )
    check_launch(config, accelerator)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # ── The data, the model, and where to start. What is wrong with the input shows here, before any writing ─
    checkpoint = None if config.train.overwrite else find_checkpoint(config.train.resume_from, output_dir)
    family = load_family(config)
    family.check_resolution(config.data.resolution)
    with accelerator.main_process_first():
        data, validation_data = split_data(load_data(config.data), config.data)
    noise_scheduler, models = family.noise_scheduler, [family.denoiser.train()]  # models: all that is trained
    if config.loss.learned_uncertainty:
        models.append(LearnedUncertainty())
    optimizer = build_optimizer(config.optimizer, [parameter for model in models for parameter in model.parameters()])
    lr_scheduler = get_scheduler(
        config.lr_scheduler.name,
        optimizer,
        num_warmup_steps=config.lr_scheduler.num_warmup_steps,
        num_training_steps=config.train.max_steps,
    )
    if config.train.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    if accelerator.is_main_process:
        fingerprints = inspect_splits(data, validation_data, config.data)
        snapshot = take_snapshot(config, accelerator, family.modules, fingerprints)

    # ── Onto the device, and back to the checkpoint ──────────────────────────────────────────────────────────
    family.move_frozen_parts(accelerator.device, weight_dtype)
    *models, optimizer, lr_scheduler = accelerator.prepare(*models, optimizer, lr_scheduler)
    denoiser, uncertainty = (*models, None)[:2]
    ema_model = None
    if config.ema.enabled:
        ema_model = EMAModel(denoiser.parameters(), decay=config.ema.decay, foreach=True)
    power_ema = None
    if config.ema.power_sigma_rels:
        power_ema = PowerEMA(denoiser.parameters(), config.ema.power_sigma_rels)
    global_step, loss_sum = 0, torch.zeros((), device=accelerator.device)  # the sum since the last line of metrics
    skipped_rows = torch.zeros_like(loss_sum)  # likewise, the samples that other rows stand in for
    if checkpoint is not None:
        state = load_checkpoint(accelerator, checkpoint, ema_model, power_ema, config.train.max_steps)
        global_step, loss_sum = state["global_step"], loss_sum + state["loss_sum"]
        skipped_rows += state.get("skipped_rows", 0) / accelerator.num_processes
        accelerator.print(f"Resuming from {checkpoint} at step {global_step} of {config.train.max_steps}")
    if accelerator.is_main_process:
        if config.train.overwrite:
            delete_run(output_dir)
        write_snapshot(output_dir, snapshot)
    metrics = Metrics(accelerator, config, global_step)

    # ── The stream of samples, from the first one that this run has not seen ─────────────────────────────────
    num_samples = config.train.max_steps * config.train.batch_size
    train_dataloader = accelerator.prepare(
        torch.utils.data.DataLoader(
            Samples(data, config.data, seed, num_samples),
            sampler=range(global_step * config.train.batch_size, num_samples),
            batch_size=config.train.batch_size // config.train.gradient_accumulation_steps,
            collate_fn=collate,
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )

    def is_due(every):
        return every > 0 and (global_step % every == 0 or global_step == config.train.max_steps)

    progress_bar = tqdm(total=config.train.max_steps, initial=global_step, desc="Steps", smoothing=0.05)
    clock, clock_step = time.perf_counter(), global_step
    for batch in train_dataloader:
        keys = batch["keys"]
        torch.manual_seed(seed_for(seed, "model", keys[0]))  # for what the model itself draws, such as dropout
        with accelerator.accumulate(*models):
            # ── One step ─────────────────────────────────────────────────────────────────────────────────────
            pixel_values = batch["pixel_values"]
            latent_shape = family.latent_shape(pixel_values)
            vae_noise = keyed_randn(seed, "vae_noise", keys, latent_shape, accelerator.device)
            latents = family.encode_images(pixel_values, vae_noise)
            predict = partial(family.predict, denoiser, conditioning=family.encode_prompts(batch["captions"]))

            noise = sample_noise(config.noise, seed, keys, latents)
            timesteps = sample_timesteps(
                config.timesteps, noise_scheduler, seed, keys, config.train.batch_size, accelerator.device
            )
            if config.strategy.dream_training and global_step >= config.strategy.dream_start_step:
                denoiser.eval()  # the probe sees the model as a sampler does
                p = config.strategy.dream_detail_preservation
                rectified = rectify_noise(predict, noise_scheduler, latents, noise, timesteps, p)
                denoiser.train()
                chosen = keyed_rand(seed, "dream", keys, accelerator.device) < config.strategy.dream_probability
                noise = torch.where(append_dims(chosen, noise), rectified, noise)

            input_noise = perturb_input(config.noise, seed, keys, noise)
            noisy_latents = add_noise(noise_scheduler, latents, input_noise, timesteps)
            target = get_target(noise_scheduler, latents, noise, timesteps)
            model_pred = predict(noisy_latents, timesteps)
            losses = elementwise_loss(config.loss, noise_scheduler, model_pred, target, timesteps).flatten(1).mean(1)
            losses = losses * loss_weights(config.loss, noise_scheduler, timesteps)
            if uncertainty is not None:
                losses = uncertainty(losses, compute_snr(noise_scheduler, timesteps))
            loss = losses.mean()

            accelerator.backward(loss)
            if accelerator.sync_gradients and config.train.max_grad_norm is not None:
                grad_norm = accelerator.clip_grad_norm_(denoiser.parameters(), config.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.detach()
        skipped_rows += sum(batch["skipped"])
        if not accelerator.sync_gradients:
            continue
        lr = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema_model is not None:
            ema_model.step(denoiser.parameters())
        global_step += 1
        if power_ema is not None:
            power_ema.step(denoiser.parameters(), global_step)
        progress_bar.update()

        # ── Now and then: metrics, pictures, a checkpoint ────────────────────────────────────────────────────
        logs = {}
        if global_step % config.train.log_every == 0:
            num_losses = config.train.log_every * config.train.gradient_accumulation_steps
            loss_mean = accelerator.reduce(loss_sum, "mean").item() / num_losses  # the device is asked only here
            loss_sum.zero_()
            if not math.isfinite(loss_mean):
                raise InputError(f"the loss is {loss_mean} in steps {clock_step + 1} to {global_step}; stopping")
            logs |= {"loss": loss_mean, "lr": lr}
            if config.data.on_bad_row == "skip":
                logs["skipped_rows"] = round(accelerator.reduce(skipped_rows, "sum").item())
                skipped_rows.zero_()
            if config.train.max_grad_norm is not None:
                logs["grad_norm"] = grad_norm.item()
            samples = (global_step - clock_step) * config.train.batch_size
            logs["samples_per_second"] = samples / (time.perf_counter() - clock)
            progress_bar.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
        if is_due(config.train.eval_every) and validation_data is not None:
            with evaluation_weights(denoiser, None):
                logs |= validation_loss(accelerator, family, denoiser, validation_data, config, "validation_loss")
            if ema_model is not None:
                with evaluation_weights(denoiser, ema_model):
                    logs |= validation_loss(
                        accelerator, family, denoiser, validation_data, config, "validation_loss_ema"
                    )
        if is_due(config.train.eval_every) and config.evaluation.prompts and accelerator.is_main_process:
            with evaluation_weights(denoiser, ema_model), accelerator.autocast():
                pipeline = family.pipeline(accelerator.unwrap_model(denoiser))
                images = generate(pipeline, config.evaluation, config.data.resolution)
            save_grid(images, config.evaluation.prompts, output_dir / "samples" / f"step-{global_step:06d}.png")
            metrics.log_images(global_step, "samples", images)
            if config.evaluation.shapes_judge:
                logs["shapes_right"] = count_right(images, config.evaluation.prompts) / len(images)
        if logs:
            metrics.log(global_step, logs)
        if power_ema is not None and is_due(config.ema.snapshot_every) and accelerator.is_main_process:
            names = [name for name, _ in accelerator.unwrap_model(denoiser).named_parameters()]
            power_ema.save_snapshot(output_dir, global_step, names)
        if is_due(config.train.save_every) or global_step == config.train.max_steps:
            loss_sum, skipped_rows = (accelerator.reduce(total, "mean") for total in (loss_sum, skipped_rows))
            state = {
                "global_step": global_step,
                "loss_sum": loss_sum.item(),
                "skipped_rows": round(skipped_rows.item() * accelerator.num_processes),
            }
            save_checkpoint(accelerator, output_dir, state, ema_model, power_ema, config.train.keep_checkpoints)
        if global_step % config.train.log_every == 0:
            clock, clock_step = time.perf_counter(), global_step
    progress_bar.close()

    # ── What the run is for: a pipeline that plain diffusers loads ───────────────────────────────────────────
    if accelerator.is_main_process:
        with evaluation_weights(denoiser, ema_model):
            family.save_pipeline(output_dir / "pipeline.partial", accelerator.unwrap_model(denoiser))
        replace_folder(output_dir / "pipeline.partial", output_dir / "pipeline")
        print(f"Done: {output_dir / 'pipeline'} holds the trained pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main(config)
