"""DDPM: a UNet on pixels that is told nothing but the time."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class DDPM(DiffusersFamily):
    """See `Family`. There is no conditioning, and no guidance (Ho et al. 2020, arXiv:2006.11239): of captions and
    prompts only the number counts. What is called latents elsewhere are the images themselves."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = DDPMPipeline
    denoiser_part: ClassVar[str] = "unet"
    image_part: ClassVar[str | None] = None
    has_fixed_size: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "DDPM":
        if config.data.cache_text:
            raise InputError("data.cache_text: must be false, a DDPMPipeline takes no captions, got True")
        if value := config.loss.contrastive:
            raise InputError(f"loss.contrastive: must be 0, a DDPMPipeline takes no captions, got {value}")
        family = super().load(source, model_index, config, weights)
        unet = family.config_of("unet")
        if (channels := (unet.in_channels, unet.out_channels)) != (3, 3):
            raise ValueError(f"unet: in_channels and out_channels must be 3, as images', got {channels}")
        if unet.class_embed_type is not None or unet.num_class_embeds is not None:
            raise ValueError("unet: it asks for a class, which a DDPMPipeline does not tell it")
        if unet.sample_size is None:
            raise ValueError("unet: it has no sample_size, which a DDPMPipeline makes images of")
        if "generator" not in inspect.signature(family.sampler.step).parameters:
            name = type(family.sampler).__name__
            raise InputError(f"scheduler.sampler: not for a DDPMPipeline, try DDIMScheduler, got {name}")
        return family

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def encode_prompts(self, captions: Sequence[str | None]) -> Conditioning:
        return {}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        return denoiser(noisy_latents, timesteps, return_dict=False)[0].float()

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        return {"batch_size": len(prompts)}
