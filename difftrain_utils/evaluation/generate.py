"""What a run generates for its evaluation prompts: from the same noise every time."""

from collections.abc import Sequence

import torch
from PIL import Image

from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.keyed_random import torch_generator_for


@torch.no_grad()
def generate(
    family,
    denoiser: torch.nn.Module,
    config: EvaluationConfig,
    resolution: int,
    prompts: Sequence[str],
    keys: Sequence[int],
) -> list[Image.Image]:
    """One image for each prompt; prompt i's noise depends on (evaluation.seed, keys[i]) alone."""
    return family.generate(
        denoiser,
        prompts,
        height=resolution,
        width=resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        generators=[torch_generator_for(config.seed, "evaluation", k) for k in keys],
    )
