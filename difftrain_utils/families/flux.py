"""Flux.1: an MMDiT on packed VAE latents, the states of a T5 and a pooled CLIP, told a guidance if it was distilled."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import JOINT_ATTENTION, DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class Flux(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the states of the T5, (batch, tokens, width), which no mask goes
    with, and "pooled_prompt_embeds", that of the CLIP, (batch, width).

    A denoiser that was distilled with guidance (Flux.1 dev: Meng et al. 2023, arXiv:2210.03142) is told `guidance` in
    training, and the guidance scale in sampling; one that was not (schnell) has classifier-free guidance."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    guidance_order: ClassVar[str] = "apart"
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_lengths: ClassVar[tuple[int, float]] = (1, 512)  # that the pipeline allows
    gives_sigmas: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "Flux":
        family = super().load(source, model_index, config, weights)
        family.check_clip("tokenizer", "text_encoder")
        return family

    @property
    def patch_size(self) -> int:
        """That of the pipeline's packing; the denoiser's own, of what is packed, is 1."""
        return 2

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.text_pipeline().encode_prompt(texts, **self.text_options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        guidance = None
        if self.has_guidance_embedding:
            guidance = torch.full(
                (len(noisy_latents),), self.guidance, device=noisy_latents.device, dtype=torch.float32
            )
        output = denoiser(
            **packed_arguments(noisy_latents, timesteps, conditioning["prompt_embeds"]),
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return unpack(output, noisy_latents).float()

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        """See `DiffusersFamily`. What the pipeline calls guidance_scale is what the denoiser is told; classifier-free
        guidance is its `true_cfg_scale`, and needs a negative prompt."""
        if self.has_guidance_embedding:
            return {"prompt": prompts, "guidance_scale": guidance_scale}
        return {"prompt": prompts, "negative_prompt": [""] * len(prompts), "true_cfg_scale": guidance_scale}


def packed_arguments(
    noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the transformers of Flux.1 and its kin are called with: latents, (batch, channels, height, width), as
    tokens of 2 × 2, (batch, height/2 · width/2, 4 · channels), the time in [0, 1], texts, and the places of both; a
    text's tokens are all at the origin."""
    batch, channels, height, width = noisy_latents.shape
    like = {"device": noisy_latents.device, "dtype": prompt_embeds.dtype}
    return {
        "hidden_states": FluxPipeline._pack_latents(noisy_latents, batch, channels, height, width),
        "timestep": timesteps / 1000,
        "encoder_hidden_states": prompt_embeds,
        "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, **like),
        "img_ids": FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **like),
    }


def unpack(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of the packing: tokens as latents of the shape of `like`."""
    return FluxPipeline._unpack_latents(tokens, *like.shape[2:], vae_scale_factor=1)  # the sides are those of latents
