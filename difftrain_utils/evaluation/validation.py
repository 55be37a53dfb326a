"""How a run does: pictures of the evaluation prompts, and a validation loss. Both use the same noise every time, and
take nothing from the training stream."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from difftrain_utils.config.config import Config
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.data.rows import Rows
from difftrain_utils.data.samples import read_row_or_substitute, to_square
from difftrain_utils.keyed_random import generator_for, keyed_rand, keyed_randn
from difftrain_utils.objective.loss import error_scale
from difftrain_utils.objective.schedule import (
    add_noise,
    alphas_and_sigmas,
    compute_snr,
    get_prediction_type,
    get_target,
)
from difftrain_utils.optimization.ema import EMA


@contextmanager
def evaluation_weights(denoiser: torch.nn.Module, ema_model: EMA | None) -> Iterator[None]:
    """Give the denoiser its EMA weights (if there are any) and eval mode, for as long as the block runs."""
    if ema_model is not None:
        ema_model.store(denoiser.parameters())
        ema_model.copy_to(denoiser.parameters())
    denoiser.eval()
    try:
        # other batch sizes than in training: they are not worth a compilation (train.compile) each
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        denoiser.train()
        if ema_model is not None:
            ema_model.restore(denoiser.parameters())


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline, config: EvaluationConfig, resolution: int, keys: Sequence[int] | None = None
) -> list[Image.Image]:
    """One image for each prompt; prompt i's noise depends on (evaluation.seed, keys[i]) alone. None: keys[i] is i."""
    images, keys = [], range(len(config.prompts)) if keys is None else keys
    for start in range(0, len(config.prompts), config.batch_size):
        prompts = config.prompts[start : start + config.batch_size]
        generators = [generator_for(config.seed, "evaluation", k) for k in keys[start : start + len(prompts)]]
        images += pipeline(
            prompts,
            height=resolution,
            width=resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
        ).images
    return images


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, family, denoiser: torch.nn.Module, data: Rows, config: Config, name: str
) -> dict[str, float | list[float]]:
    """The loss at fixed (image, noise, noise level) triples: {name: mean, name_bins: means from low to high noise}.

    The triples depend on `evaluation.seed` alone, not on the run, so that runs can be compared; the processes share
    them out. The noise levels are equally spread over the angle φ = atan(s/a), from 0 (no noise) to π/2. The loss is
    the unweighted squared error of v = cos φ·ε - sin φ·x_0, (SNR + 1)·|x̂_0 - x_0|², whatever the model predicts.
    """
    evaluation, noise_scheduler = config.evaluation, family.noise_scheduler
    denoiser = accelerator.unwrap_model(denoiser)  # the processes may have unlike numbers of batches
    bins = torch.zeros(evaluation.num_validation_bins, dtype=torch.float64, device=accelerator.device)
    mine = range(accelerator.process_index, evaluation.num_validation_samples, accelerator.num_processes)
    for start in range(0, len(mine), evaluation.batch_size):
        keys = mine[start : start + evaluation.batch_size]
        rows = [read_row_or_substitute(data, j % len(data), config.data, evaluation.seed, j) for j in keys]
        pixel_values = torch.stack([to_square(image, config.data) for image, _ in rows])
        pixel_values = pixel_values.to(accelerator.device)
        moments = family.encode_images(pixel_values)
        vae_noise, noise = (
            keyed_randn(evaluation.seed, purpose, keys, moments.shape[2:], accelerator.device)
            for purpose in ("validation_vae_noise", "validation_noise")
        )
        latents = family.sample_latents(moments, vae_noise)
        timesteps = validation_timesteps(evaluation, noise_scheduler, keys).to(accelerator.device)
        noisy_latents = add_noise(noise_scheduler, latents, noise, timesteps)
        target = get_target(noise_scheduler, latents, noise, timesteps)
        conditioning = family.encode_prompts([captions[0] for _, captions in rows])
        model_pred = family.predict(denoiser, noisy_latents, timesteps, conditioning)
        losses = (model_pred - target).square().flatten(1).mean(1)
        losses *= (compute_snr(noise_scheduler, timesteps) + 1) / error_scale(noise_scheduler, timesteps)
        bins.index_add_(0, torch.tensor([j % len(bins) for j in keys], device=bins.device), losses.double())
    bins = accelerator.reduce(bins, "sum") * len(bins) / evaluation.num_validation_samples
    return {name: bins.mean().item(), f"{name}_bins": bins.tolist()}


def validation_timesteps(config: EvaluationConfig, noise_scheduler, keys: Iterable[int]) -> torch.Tensor:
    """The timesteps whose noise level is that of the triples `keys`, or nearest to it: triple j lies in bin j modulo
    `evaluation.num_validation_bins` of the angle φ = atan(s/a), at a place drawn from (evaluation.seed, j)."""
    bins = config.num_validation_bins
    places = keyed_rand(config.seed, "validation_noise_level", keys).double()
    angles = (torch.tensor([j % bins for j in keys]) + places) / bins * (math.pi / 2)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    if get_prediction_type(noise_scheduler) == "flow_prediction":
        sigmas = angles.tan() / (1 + angles.tan())
        return (sigmas * num_timesteps).float()
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, torch.arange(num_timesteps))
    return (torch.atan2(sigmas, alphas)[None, :] - angles[:, None]).abs().argmin(1)


def labelled_grid(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """All images with their labels underneath, about square; small ones are shown at 128 pixels or more."""
    scale = max(1, -(-128 // images[0].width))
    width, height = images[0].width * scale, images[0].height * scale
    columns = min(len(images), math.ceil(math.sqrt(1.6 * len(images))))  # wider than high
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=max(12, width // 24))
    margin, line = 6, int(font.size * 1.6)
    grid = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + line + margin) + margin), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = margin + i % columns * (width + margin), margin + i // columns * (height + line + margin)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), _shorten(label, font, width), fill="black", font=font)
    return grid


def save_grid(images: list[Image.Image], labels: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(images, labels).save(path)


def _shorten(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…"
