"""Train a text-to-video diffusion model.

    accelerate launch train_text_to_video.py --config configs/quickstart_video.yaml
    accelerate launch train_text_to_video.py --config configs/quickstart_video.yaml --resume-from latest
    accelerate launch train_text_to_video.py --help

This file is the whole run, in the order it happens: copy it and change it. Formulas and file formats are in
difftrain_utils. The one idea to know: sample k of a run (its video, window, crop, caption, noise and timestep) is
a function of (config, seed, k), and optimizer step s takes the samples [s·G, (s+1)·G), G = train.batch_size. So
a run can be stopped and resumed anywhere, or split over other numbers of processes, and sees the same samples.
"""

from difftrain_utils.config.command_line import parse_config
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import one_line_errors
from difftrain_utils.terminal import STOPPED, announce

if __name__ == "__main__":  # before the slow imports, so that a typo is reported at once
    with one_line_errors():
        config = parse_config(TextToVideoConfig)
    announce("Importing torch and diffusers")

import sys
import time
from functools import partial

from difftrain_utils.data.caches import load_caches
from difftrain_utils.data.load import load_data
from difftrain_utils.data.samples import Samples, load_batches
from difftrain_utils.devices import seed_device
from difftrain_utils.evaluation.evaluate import Evaluation
from difftrain_utils.families.load import load_family, trained_models
from difftrain_utils.keyed_random import seed_for
from difftrain_utils.objective.contrastive import contrastive_losses
from difftrain_utils.objective.dream import dream_noise
from difftrain_utils.objective.first_frames import give_first_frames
from difftrain_utils.objective.loss import sample_losses
from difftrain_utils.objective.noise import perturb_input, sample_noise
from difftrain_utils.objective.timesteps import sample_timesteps
from difftrain_utils.optimization.averages import build_averages
from difftrain_utils.optimization.optimizers import build_lr_scheduler, build_optimizer, clip_gradients
from difftrain_utils.optimization.trained import trained_parameters
from difftrain_utils.processes import on_main_process
from difftrain_utils.run.checkpoints import begin_run, count_epochs, find_checkpoint, is_finished
from difftrain_utils.run.export import export_pipeline
from difftrain_utils.run.interruptions import Interruptions
from difftrain_utils.run.launch import launch, prepare
from difftrain_utils.run.meter import Meter
from difftrain_utils.run.profiler import Profiler
from difftrain_utils.run.state import TrainState
from difftrain_utils.run.summary import describe_run


def main(config: TextToVideoConfig) -> int:
    """The run; returns its exit code."""
    started, seed, batch_size = time.monotonic(), config.train.seed_of("noise"), config.train.batch_size
    max_grad_norm, group_size = config.train.max_grad_norm, config.train.group_size

    # ── The machine, and where to start ──────────────────────────────────────────────────────────────────────
    accelerator = launch(config)
    checkpoint = on_main_process(accelerator, partial(find_checkpoint, config))
    if is_finished(config, checkpoint):
        accelerator.print(f"Nothing to do: {config.train.output_dir} is finished, at {checkpoint.name}")
        return 0

    # ── Model and data. What is wrong with the input shows here, before anything is written ──────────────────
    family = load_family(config)
    models = trained_models(family, config)
    optimizer = build_optimizer(config.optimizer, models)
    data = load_data(accelerator, family, config)
    count_epochs(config, data.samples_per_epoch, checkpoint)
    lr_scheduler = build_lr_scheduler(config.lr_scheduler, optimizer, config.train.max_steps)
    evaluation = Evaluation(accelerator, family, data.validation_rows, config)
    record = prepare(accelerator, family, models, data, checkpoint, config)
    accelerator.print(describe_run(accelerator, family, models, optimizer, data, checkpoint, config), flush=True)

    # ── Onto the device, and back to the checkpoint ──────────────────────────────────────────────────────────
    schedule, device = family.schedule, accelerator.device
    family.move_frozen_parts(accelerator, config.train)
    caches = load_caches(accelerator, family, data, record.fingerprints, config)  # to make them may take hours
    state = TrainState(accelerator, models, optimizer, lr_scheduler, record, config.train)
    denoiser, text_encoders = state.models["denoiser"], state.models.get("text_encoders")
    uncertainty = state.models.get("uncertainty")
    parameters = trained_parameters(denoiser, text_encoders)
    state.averages = build_averages(config.ema, parameters)
    state.load(checkpoint)
    begin_run(accelerator, record, state.step, checkpoint, config.train)

    # ── The stream of samples, from the first one that this run has not seen ─────────────────────────────────
    samples = Samples(data, config.data, config.train.seed_of("data"), config.train.max_steps * batch_size, caches)
    batches = load_batches(accelerator, samples, state, config)

    with (
        Interruptions(accelerator, started, config.train) as interruptions,
        Profiler(accelerator, config.train) as profiler,
        Meter(accelerator, state, data, config) as meter,
    ):
        while not state.is_finished and not interruptions.stop:
            # ── One step: the gradient of a batch, in parts ──────────────────────────────────────────────────
            for batch in meter.parts(batches):
                keys, conditions = batch["keys"], batch["conditions"]
                seed_device(seed_for(seed, "model", keys[0]), device)  # for what the model draws, such as dropout
                with accelerator.accumulate(*state.models.values()):
                    latents, conditioning = family.encode(batch, seed, text_encoders)
                    predict = partial(family.predict, denoiser, conditioning=conditioning)
                    noise = sample_noise(config.noise, seed, keys, latents, conditions, group_size)
                    shift = family.shift(*latents.shape[2:])
                    timesteps = sample_timesteps(config.timesteps, schedule, seed, keys, batch_size, shift, device)
                    times, counts = give_first_frames(config.model, seed, keys, latents, timesteps)  # of each frame
                    if config.strategy.dream_training and state.step >= config.strategy.dream_start_step:
                        noise = dream_noise(
                            config.strategy, schedule, denoiser, predict, latents, noise, times, seed, keys
                        )

                    input_noise = perturb_input(config.noise, seed, keys, noise)
                    noisy_latents = schedule.add_noise(latents, input_noise, times)
                    target = schedule.target(latents, noise, times)
                    output = predict(noisy_latents, times)

                    losses = {"denoising": sample_losses(config.loss, schedule, output, target, timesteps, counts)}
                    if uncertainty is not None:
                        losses["denoising"] = uncertainty(losses["denoising"], schedule.snr(timesteps))
                    if config.loss.contrastive:
                        losses["contrastive"] = contrastive_losses(
                            config.loss, schedule, output, latents, noise, timesteps, conditions, group_size, counts
                        )
                    losses = {name: values * batch["weights"] for name, values in losses.items()}
                    accelerator.backward(sum(losses.values()).mean())
                state.add(losses, batch)
                meter.count_flops(predict, noisy_latents, times)

            # ── The update ───────────────────────────────────────────────────────────────────────────────────
            grad_norm = clip_gradients(accelerator, state.optimizer, dict.fromkeys(state.models, max_grad_norm))
            if state.accepts(grad_norm, samples):
                state.optimizer.step()
            state.optimizer.zero_grad()
            lr = state.lr_scheduler.get_last_lr()[0]
            state.lr_scheduler.step()
            state.end_step()
            for average in state.averages.values():
                average.step(parameters, state.step)

            # ── Now and then: metrics, samples, a checkpoint ─────────────────────────────────────────────────
            interruptions.poll()  # before anything is printed
            logs = meter.end_step(grad_norm, lr)
            profiler.step()
            if state.is_due(config.train.eval_every):
                with state.evaluation_mode():
                    logs |= evaluation.evaluate(denoiser, state.averages.get("ema"), state.step)
            meter.log(logs)
            if state.is_due(config.ema.snapshot_every):
                state.save_ema_snapshot()
            state.save_weights(logs)
            if state.is_due(config.train.log_every):
                state.finish_saving()  # of a checkpoint that was begun in the background
            if state.is_due(config.train.save_every) or state.is_finished or interruptions.stop or interruptions.save:
                state.save(required=state.is_finished or interruptions.stop is not None)
                interruptions.saved()

    # ── What the run is for: a model that plain libraries load ───────────────────────────────────────────────
    weights, ema = None, state.averages.get("ema")
    if state.is_finished:
        with state.evaluation_mode():
            plain = state.plain["denoiser"]
            weights = export_pipeline(accelerator, family, denoiser, plain, ema, config.train.output_dir)
    record.end(state.step, interruptions.stop, weights)
    accelerator.end_training()
    return 0 if state.is_finished else STOPPED


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(config))
