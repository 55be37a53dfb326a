"""How a run does: a validation loss, pictures of the evaluation prompts and what can be said of them."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from difftrain_utils.builtins import shapes
from difftrain_utils.config.config import Config
from difftrain_utils.data.rows import MappedRows
from difftrain_utils.devices import weight_dtype
from difftrain_utils.errors import go_on_without, warn
from difftrain_utils.evaluation.clip_metrics import load_clip_networks
from difftrain_utils.evaluation.generate import generate, load_first_frames
from difftrain_utils.evaluation.guidance import check_guidance, load_weaker
from difftrain_utils.evaluation.image_metrics import image_metrics, load_metric_networks
from difftrain_utils.evaluation.scores import JUDGES, check_captions
from difftrain_utils.evaluation.sound_metrics import load_sound_networks
from difftrain_utils.evaluation.validation import (
    by_noise_level,
    save_validation_losses,
    validation_losses,
    validation_preferences,
)
from difftrain_utils.families.reference import Reference
from difftrain_utils.media import audio, video
from difftrain_utils.media.media import media_of
from difftrain_utils.optimization.ema import EMA, evaluation_weights
from difftrain_utils.processes import main_process_first, share_out
from difftrain_utils.run.run_folder import SAMPLES, VALIDATION, step_file
from difftrain_utils.run.tracking import log_samples
from difftrain_utils.terminal import progress


class Evaluation:
    """What is evaluated every `train.eval_every` steps; with a `reference`, of pairs of images. Its networks are loaded
    when it is made.

    Raises:
        InputError: a network cannot be loaded, or there are too few held-out images for it, or a prompt is no caption
            that the judge knows; or see `load_first_frames`, `check_guidance` and `load_weaker`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family,
        validation_rows: MappedRows | None,
        config: Config,
        reference: Reference | None = None,
    ):
        self.accelerator, self.family, self.rows, self.config = accelerator, family, validation_rows, config
        self.reference, is_video = reference, media_of(config.data) is video
        if config.evaluation.shapes_judge:
            check_captions(config.judge, config.evaluation.prompts, "evaluation.prompts")
        self.first_frames = load_first_frames(family, config) if is_video else None
        if is_video and config.evaluation.prompts and (why := video.no_mp4()):
            warn(f"evaluation.prompts: clips are shown as WebP alone, not as MP4, because {why}")
        with main_process_first(accelerator):
            of_medium = {video: load_clip_networks, audio: load_sound_networks}
            load = of_medium.get(media_of(config.data), load_metric_networks)
            self.networks = load(config, validation_rows, accelerator.device)
            check_guidance(family, config.evaluation)
            self.weaker = None
            if (name := config.evaluation.autoguidance) is not None and family.has_weights:
                dtype = weight_dtype(accelerator.mixed_precision)
                self.weaker = load_weaker(family, family.sampler, name, accelerator.device, dtype)

    def evaluate(self, denoiser: torch.nn.Module, ema: EMA | None, step: int) -> dict[str, Any]:
        """The line of metrics. All processes call it and share the work out; the grid of images is written by one.

        The validation loss, and what is measured of pairs beside it, is taken of the raw and of the EMA weights, all
        else of the EMA weights if there are any.
        """
        evaluation, logs, denoiser = self.config.evaluation, {}, self.accelerator.unwrap_model(denoiser)
        models = denoiser, self.family.text_encoders
        if self.rows is not None:
            found, num_bins = {}, evaluation.num_validation_bins
            weights = {"": None} | ({"_ema": ema} if ema is not None else {})
            for suffix, average in weights.items():
                with evaluation_weights(average, *models):
                    found |= {f"{name}{suffix}": values for name, values in self.validate(denoiser).items()}
            for name, values in found.items():
                logs |= by_noise_level(name, values, num_bins)
            if self.accelerator.is_main_process:
                path = step_file(self.config.train.output_dir, VALIDATION, step, ".safetensors")
                with go_on_without():
                    save_validation_losses(found, len(self.rows), num_bins, path)
        if evaluation.prompts:
            with evaluation_weights(ema, *models), self.accelerator.autocast():
                images = self.generate_grid(denoiser)
            if self.accelerator.is_main_process:
                with go_on_without():  # also without showing them, for trackers are given the files
                    path = step_file(self.config.train.output_dir, SAMPLES, step, ".png")
                    media_of(self.config.data).save(images, evaluation.prompts, path)
                    log_samples(self.accelerator, step, "samples", images, evaluation.prompts, path)
            if evaluation.shapes_judge:
                logs |= JUDGES[self.config.judge].share_right(images, evaluation.prompts)
                if self.reference is not None:
                    logs["shapes_preferred"] = shapes.count_preferred(images, evaluation.prompts) / len(images)
        if self.networks:
            with evaluation_weights(ema, *models), self.accelerator.autocast():
                logs |= image_metrics(
                    self.accelerator, self.networks, self.family, denoiser, self.rows, self.config, self.weaker
                )
        self.family.free_cached()
        return logs

    def validate(self, denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What is found of the fixed triples of the held-out rows, by its name in the line of metrics."""
        run = self.accelerator, self.family, denoiser
        if self.reference is None:
            return {"validation_loss": validation_losses(*run, self.rows, self.config)}
        return validation_preferences(*run, self.reference, self.rows, self.config)

    def generate_grid(self, denoiser: torch.nn.Module) -> list:
        """The images of all evaluation prompts, of which each process makes its share."""
        evaluation, size, made = self.config.evaluation, media_of(self.config.data).size_of(self.config.data), []
        batches = share_out(self.accelerator, len(evaluation.prompts), evaluation.batch_size)
        for keys, num_kept in progress(batches, len(batches), "Drawing, batches"):
            prompts = [evaluation.prompts[i] for i in keys]
            first_frames = self.first_frames and [self.first_frames[i] for i in keys]
            drawn = generate(self.family, denoiser, evaluation, size, prompts, keys, self.weaker, first_frames)
            made += list(zip(keys, drawn, strict=True))[:num_kept]
        images = dict(gather_object(made))
        return [images[i] for i in range(len(evaluation.prompts))]
