"""PRXPixel: a transformer on pixels that gives the clean image, and attends to the states of a Qwen3."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, PRXPixelPipeline
from diffusers.utils import is_ftfy_available
from PIL import Image

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, not_installed
from difftrain_utils.families.diffusers_family import INNER_FIELDS, DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class PRXPixel(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the text encoder's last states, (batch, tokens, width), and
    "prompt_embeds_mask", (batch, tokens).

    The transformer predicts the clean image, and its noise has the standard deviation `noise_scale` (Li and He 2025,
    arXiv:2511.13720). Latents are pixels divided by that, so that their noise is standard normal, as the schedule has
    it: x_t = (1 - σ)·x_0 + σ·ε of latents is that of pixels with noise_scale·ε, divided by noise_scale."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PRXPixelPipeline
    guidance_order: ClassVar[str] = "nothing first"
    converts_itself: ClassVar[bool] = True
    image_part: ClassVar[str | None] = None
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    lora_targets: ClassVar[tuple[str, ...]] = ("img_qkv_proj", "txt_kv_proj", "to_out.0")
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS | {
        *("hidden_size", "mlp_ratio", "num_heads", "depth", "axes_dim", "theta", "time_max_period", "bottleneck_size")
    }

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "PRXPixel":
        """See `Family`. Noise levels are flow matching's, as its sampler's are, whatever is predicted of them."""
        if config.model.prediction_type not in (None, "sample"):
            got = config.model.prediction_type
            raise InputError(f"model.prediction_type: must be sample for a PRXPixelPipeline, or null, got {got}")
        if config.scheduler.path not in (None, "linear"):
            raise InputError(f"scheduler.path: must be linear for a PRXPixelPipeline, got {config.scheduler.path}")
        if not is_ftfy_available():
            raise InputError(
                f"model.pretrained_model_name_or_path: a PRXPixelPipeline cleans captions, and {not_installed('ftfy')}"
            )
        flow = dataclasses.replace(config, model=dataclasses.replace(config.model, prediction_type=None))
        family = super().load(source, model_index, flow, weights)
        family.schedule = dataclasses.replace(family.schedule, prediction_type="sample")
        if (channels := family.config_of("transformer").in_channels) != 3:
            raise ValueError(f"transformer: in_channels must be 3, as images', got {channels}")
        if family.sampler.config.get("use_dynamic_shifting"):
            raise ValueError("scheduler: use_dynamic_shifting must be false, a PRXPixelPipeline tells it no shift")
        if not (isinstance(family.noise_scale, int | float) and 0 < family.noise_scale < math.inf):
            raise ValueError(f"noise_scale must be a number above 0, got {family.noise_scale!r}")
        return family

    @property
    def pipeline_options(self) -> dict[str, Any]:
        parameters = inspect.signature(PRXPixelPipeline).parameters
        names = ("default_sample_size", "prompt_max_tokens", "noise_scale")
        return {name: self.model_index.get(name, parameters[name].default) for name in names}

    @property
    def noise_scale(self) -> float:
        return self.pipeline_options["noise_scale"]

    @property
    def text_length(self) -> int:
        return self.pipeline_options["prompt_max_tokens"]

    def describe_parts(self, *parts: str) -> dict[str, str]:
        return super().describe_parts(*parts) | {"prompt_max_tokens": str(self.text_length)}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / self.noise_scale

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(texts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        output = denoiser(
            hidden_states=noisy_latents * self.noise_scale,
            timestep=timesteps / self.schedule.num_train_timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            attention_mask=conditioning["prompt_embeds_mask"],
            return_dict=False,
        )[0]
        return self.normalise(output.float())

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Image.Image]:
        """See `Family`. Guided images one by one: its pipeline gives the transformer two timesteps then, for however
        many prompts (diffusers 0.42)."""
        images, at_once = [], len(prompts) if guidance_scale == 1 else 1
        for start in range(0, len(prompts), at_once):
            lot = slice(start, start + at_once)
            images += super().generate(
                denoiser,
                prompts[lot],
                height,
                width,
                num_inference_steps,
                guidance_scale,
                guidance_rescale,
                generators[lot],
            )
        return images
