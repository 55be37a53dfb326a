"""Train a text-to-image latent diffusion model.

    accelerate launch train_text_to_image.py --config configs/quickstart.yaml
    accelerate launch train_text_to_image.py --config configs/quickstart.yaml --resume-from latest
    accelerate launch train_text_to_image.py --help

This file is the whole run, in the order it happens: copy it and change it. Formulas and file formats are in
difftrain_utils. The one idea to know: sample k of a run (its image, crop, caption, noise and timestep) is a
function of (config, seed, k), and optimizer step s takes the samples [s·G, (s+1)·G), G = train.batch_size. So
a run can be stopped and resumed anywhere, or split over other numbers of processes, and sees the same samples.
"""

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.config import MIXED_PRECISION
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.errors import RunError, blame, one_line_errors

if __name__ == "__main__":  # before the slow imports, so that a typo is told at once
    with one_line_errors():
        config = parse_config(TextToImageConfig)

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, tqdm
from diffusers.optimization import get_scheduler

from difftrain_utils.builtins.shapes import count_right
from difftrain_utils.data.buckets import load_buckets
from difftrain_utils.data.encoded import load_caches
from difftrain_utils.data.fingerprint import inspect_splits
from difftrain_utils.data.rows import load_data, split_data
from difftrain_utils.data.samples import Samples, collate
from difftrain_utils.data.streaming import load_stream
from difftrain_utils.devices import seed_device
from difftrain_utils.evaluation.image_metrics import image_metrics, load_metric_networks
from difftrain_utils.evaluation.validation import evaluation_weights, generate, save_grid, validation_loss
from difftrain_utils.families.load import load_family
from difftrain_utils.files import new_folder, weights_digest
from difftrain_utils.keyed_random import keyed_rand, keyed_randn, seed_for
from difftrain_utils.objective.dream import rectify_noise
from difftrain_utils.objective.loss import LearnedUncertainty, elementwise_loss, loss_weights
from difftrain_utils.objective.noise import perturb_input, sample_noise
from difftrain_utils.objective.schedule import add_noise, append_dims, compute_snr, get_target
from difftrain_utils.objective.timesteps import sample_timesteps
from difftrain_utils.optimization.ema import EMA
from difftrain_utils.optimization.optimizers import build_optimizer
from difftrain_utils.optimization.power_ema import PowerEMA
from difftrain_utils.run.checkpoints import (
    check_origin,
    delete_run,
    find_checkpoint,
    is_finished,
    load_checkpoint,
    save_checkpoint,
    set_newer_aside,
)
from difftrain_utils.run.interruptions import EXIT_CODE, Interruptions
from difftrain_utils.run.launch import check_launch, pause_at_exit
from difftrain_utils.run.machine import check_compile, keep_freed_memory, set_tf32, speed_up
from difftrain_utils.run.manifest import (
    end_snapshot,
    set_deterministic,
    take_snapshot,
    write_snapshot,
)
from difftrain_utils.run.meter import Profiler, StepTimer
from difftrain_utils.run.tracking import Metrics, Totals, check_trackers


def main(config):
    seed, output_dir, started = config.train.seed, Path(config.train.output_dir), time.monotonic()

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
    pause_at_exit(accelerator)
    check_compile(config.train, accelerator.device)
    set_tf32(config.train, accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)

    # ── The data, the model, and where to start. What is wrong with the input shows here, before any writing ─
    checkpoint = find_checkpoint(config)
    if is_finished(config, checkpoint):
        accelerator.print(f"Nothing to do: {output_dir} is finished, at step {config.train.max_steps}")
        return
    family = load_family(config)
    family.check_size(config.data.resolution, config.data.resolution, "data.resolution")
    with accelerator.main_process_first():
        data = load_stream(config.data, seed) if config.data.streaming else load_data(config.data)
        data, validation_data = split_data(data, config.data)
        metric_networks = load_metric_networks(config, validation_data, accelerator.device)
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
    buckets = load_buckets(accelerator, family, data, config) if config.data.buckets else None
    num_samples = config.train.max_steps * config.train.batch_size
    train_dataset = Samples(data, config.data, seed, num_samples, config.train.batch_size, buckets)
    fingerprints, snapshot = None, None
    if accelerator.is_main_process:
        fingerprints = inspect_splits(data, validation_data, config.data)
        snapshot = take_snapshot(config, accelerator, family.digests(), fingerprints)
        if checkpoint is not None:
            check_origin(checkpoint, snapshot, config)

    # ── Onto the device, and back to the checkpoint ──────────────────────────────────────────────────────────
    family.move_frozen_parts(accelerator.device, weight_dtype)
    # not before all is checked, for making caches may take hours
    train_dataset.latents, train_dataset.prompts = load_caches(accelerator, family, data, config, fingerprints, buckets)
    speed_up(config.train, family.denoiser)
    *models, optimizer, lr_scheduler = accelerator.prepare(*models, optimizer, lr_scheduler)
    denoiser, uncertainty = models[0], models[1] if config.loss.learned_uncertainty else None
    parameters = list(denoiser.parameters())
    ema_model = None
    if config.ema.enabled:
        ema_model = EMA(parameters, config.ema)
    power_ema = None
    if config.ema.power_sigma_rels:
        power_ema = PowerEMA(parameters, config.ema.power_sigma_rels)
    global_step, skipped_steps, state = 0, 0, {}
    if checkpoint is not None:
        state = load_checkpoint(accelerator, checkpoint, ema_model, power_ema)
        global_step, skipped_steps = state["global_step"], state["skipped_steps"]
        if config.data.streaming:
            data.load_state(state.get("stream"))
        accelerator.print(f"Resuming from {checkpoint} at step {global_step} of {config.train.max_steps}")
    if accelerator.is_main_process:
        if config.train.overwrite:
            delete_run(output_dir)
        set_newer_aside(output_dir, global_step)
        write_snapshot(output_dir, snapshot, global_step, checkpoint)
    metrics = Metrics(accelerator, config, global_step)
    totals = Totals(accelerator, state.get("totals"))  # of the steps since the last line of metrics

    # ── The stream of samples, from the first one that this run has not seen ─────────────────────────────────
    train_dataloader = accelerator.prepare(
        torch.utils.data.DataLoader(
            train_dataset,
            sampler=range(global_step * config.train.batch_size, len(train_dataset)),
            batch_size=config.train.batch_size // config.train.gradient_accumulation_steps,
            collate_fn=collate,
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )

    stream_state = data.start_state() if config.data.streaming else None  # where a stream goes on after global_step

    def is_due(every):
        return every > 0 and (global_step % every == 0 or global_step == config.train.max_steps)

    def save(required=False):
        state = {"global_step": global_step, "skipped_steps": skipped_steps}
        state |= {"totals": totals.state(), "stream": stream_state}
        parts = (snapshot, ema_model, power_ema)
        save_checkpoint(accelerator, output_dir, state, *parts, config.train.keep_checkpoints, required)

    stop = None
    interruptions = Interruptions(config.train, accelerator, started)
    progress_bar = tqdm(total=config.train.max_steps, initial=global_step, desc="Steps", smoothing=0.05, mininterval=1)
    timer, profiler = StepTimer(config.train, accelerator), Profiler(config.train, accelerator)
    for batch in timer.batches(train_dataloader):
        keys = batch["keys"]
        seed_device(seed_for(seed, "model", keys[0]), accelerator.device)  # for what the model draws, such as dropout
        with accelerator.accumulate(*models):
            # ── One step ─────────────────────────────────────────────────────────────────────────────────────
            moments = batch["moments"] if config.data.cache_latents else family.encode_images(batch["pixel_values"])
            vae_noise = keyed_randn(seed, "vae_noise", keys, moments.shape[2:], accelerator.device)
            latents = family.sample_latents(moments, vae_noise)
            conditioning = batch["conditioning"] if config.data.cache_text else family.encode_prompts(batch["captions"])
            predict = partial(family.predict, denoiser, conditioning=conditioning)

            noise = sample_noise(config.noise, seed, keys, latents, config.train.group_size)
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
            timer.count_flops(denoiser, family.predict, noisy_latents, timesteps, conditioning)
            totals.add(loss.detach() / config.train.gradient_accumulation_steps, batch["skipped"])
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(
                    parameters,
                    math.inf if config.train.max_grad_norm is None else config.train.max_grad_norm,
                )
                is_finite = grad_norm.isfinite().item()
                if not is_finite and accelerator.scaler is None:  # with fp16 this is usual, and skipped by the scaler
                    if config.train.on_nonfinite == "stop" or skipped_steps >= config.train.max_skipped_steps:
                        save(required=True)
                        if config.data.streaming:
                            data.load_state(stream_state)  # to name the samples without reading all before
                        raise RunError(train_dataset.describe_nonfinite(global_step, config.train, grad_norm.item()))
                    optimizer.zero_grad()  # without gradients the optimizer changes nothing
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        totals.end_step(is_finite)
        skipped_steps += not is_finite
        lr = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        global_step, stream_state = global_step + 1, batch["stream_state"]
        for average in filter(None, (ema_model, power_ema)):
            average.step(parameters, global_step)
        progress_bar.update()

        # ── Now and then: metrics, pictures, a checkpoint ────────────────────────────────────────────────────
        logs, (stop, save_now) = {}, interruptions.poll()
        timer.end_step()
        profiler.step()
        if global_step % config.train.log_every == 0:
            if accelerator.scaler is not None and accelerator.scaler.get_scale() < 1e-4:
                raise RunError(f"at step {global_step} no loss scale makes fp16's gradient finite; use bf16")
            logs = totals.take() | {"lr": lr}
            if config.data.on_bad_row == "stop":
                del logs["skipped_rows"]
            if is_finite:
                logs["grad_norm"] = grad_norm.item()
            if skipped_steps:
                logs["skipped_steps"] = skipped_steps
            logs |= timer.take()
            progress_bar.set_postfix({name: f"{value:.3g}" for name, value in logs.items()}, refresh=False)
        if is_due(config.train.eval_every):
            if validation_data is not None:
                loss_of = partial(validation_loss, accelerator, family, denoiser, validation_data, config)
                with evaluation_weights(denoiser, None):
                    logs |= loss_of("validation_loss")
                if ema_model is not None:
                    with evaluation_weights(denoiser, ema_model):
                        logs |= loss_of("validation_loss_ema")
            if config.evaluation.prompts and accelerator.is_main_process:
                with evaluation_weights(denoiser, ema_model), accelerator.autocast():
                    pipeline = family.pipeline(accelerator.unwrap_model(denoiser))
                    images = generate(pipeline, config.evaluation, config.data.resolution)
                save_grid(images, config.evaluation.prompts, output_dir / "samples" / f"step-{global_step:06d}.png")
                metrics.log_images(global_step, "samples", images)
                if config.evaluation.shapes_judge:
                    logs["shapes_right"] = count_right(images, config.evaluation.prompts) / len(images)
            if metric_networks:
                with evaluation_weights(denoiser, ema_model), accelerator.autocast():
                    pipeline = family.pipeline(accelerator.unwrap_model(denoiser))
                    logs |= image_metrics(accelerator, metric_networks, pipeline, validation_data, config)
            pipeline = None  # it holds encoders that training from caches does without
            family.free_cached()
        if logs:
            metrics.log(global_step, logs)
        if power_ema is not None and is_due(config.ema.snapshot_every) and accelerator.is_main_process:
            names = [name for name, _ in accelerator.unwrap_model(denoiser).named_parameters()]
            power_ema.save_snapshot(output_dir, global_step, names)
        is_last = global_step == config.train.max_steps
        if is_due(config.train.save_every) or save_now or stop or is_last:
            save(required=stop or is_last)
            interruptions.saved()
        if stop:
            break
    progress_bar.close()
    profiler.end()
    interruptions.end()
    if global_step < config.train.max_steps:
        if accelerator.is_main_process:
            end_snapshot(output_dir, global_step, stop)
            print(f"Stopped at step {global_step} by {stop}; --resume-from latest goes on")
        accelerator.end_training()
        sys.exit(EXIT_CODE)

    # ── What the run is for: a pipeline that plain diffusers loads ───────────────────────────────────────────
    if accelerator.is_main_process:
        weights = {"raw": weights_digest(accelerator.unwrap_model(denoiser))}
        with evaluation_weights(denoiser, ema_model), new_folder(output_dir / "pipeline") as folder:
            weights["pipeline"] = weights_digest(accelerator.unwrap_model(denoiser))
            family.save_pipeline(folder, accelerator.unwrap_model(denoiser))
        end_snapshot(output_dir, global_step, "finished", weights)
        print(f"Done: {output_dir / 'pipeline'} holds the trained pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    with one_line_errors():
        main(config)
