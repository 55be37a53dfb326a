"""Pictures of the progress: the evaluation prompts, generated from the same noise every time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFont

from difftrain_utils.config import EvaluationConfig
from difftrain_utils.keyed_random import generator_for


@contextmanager
def evaluation_weights(denoiser: torch.nn.Module, ema_model: EMAModel | None) -> Iterator[None]:
    """Give the denoiser its EMA weights (if there are any) and eval mode, for as long as the block runs."""
    if ema_model is not None:
        ema_model.store(denoiser.parameters())
        ema_model.copy_to(denoiser.parameters())
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train()
        if ema_model is not None:
            ema_model.restore(denoiser.parameters())


@torch.no_grad()
def generate(pipeline: DiffusionPipeline, config: EvaluationConfig, resolution: int) -> list[Image.Image]:
    """One image for each prompt; prompt i's noise depends on (evaluation.seed, i) alone."""
    images = []
    for start in range(0, len(config.prompts), config.batch_size):
        prompts = config.prompts[start : start + config.batch_size]
        generators = [generator_for(config.seed, "evaluation", start + i) for i in range(len(prompts))]
        images += pipeline(
            prompts,
            height=resolution,
            width=resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generators,
        ).images
    return images


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
