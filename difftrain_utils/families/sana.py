"""Sana: a linear transformer on the latents of a deep-compression autoencoder, which attends to the states of a
Gemma."""

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, SanaPipeline

from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning

PIPELINE_MULTIPLE = 32  # of the sides of all images of a SanaPipeline, whatever its autoencoder


@dataclass
class Sana(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the Gemma's last hidden states, (batch, tokens, width), and
    "prompt_embeds_mask", (batch, tokens). A caption is encoded behind an instruction to write a better one, the
    pipeline's default, of which the first token is kept (Xie et al. 2024, arXiv:2410.10629, section 2.3)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    guidance_order: ClassVar[str] = "nothing first"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** (len(self.config_of("vae").encoder_block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        return math.lcm(super().size_multiple, PIPELINE_MULTIPLE)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The autoencoder has no posterior: a standard deviation of 0."""
        vae = self.part("vae")
        latents = vae.encode(pixel_values.to(vae.dtype)).latent
        return torch.stack([latents, torch.zeros_like(latents)], 1)

    def encode_texts(self, texts: list[str]) -> Conditioning:
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return self._encode(texts, instruction)

    def encode_nothing(self) -> Conditioning:
        """The empty caption without the instruction."""
        return self._encode([""], None)

    def _encode(self, texts: list[str], instruction: list[str] | None) -> Conditioning:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, complex_human_instruction=instruction, **self.text_options
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        output = denoiser(
            noisy_latents,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            timestep=timesteps * self.config_of("transformer").timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]].float()
