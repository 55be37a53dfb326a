"""Stable Diffusion 3 and 3.5: an MMDiT on VAE latents and the states of two CLIPs and a T5."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import JOINT_ATTENTION, DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights

SUFFIXES = ("", "_2", "_3")


@dataclass
class StableDiffusion3(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the states of the CLIPs and then of the T5, (batch, tokens, width),
    which no mask goes with, and "pooled_prompt_embeds", those of the CLIPs, (batch, width).

    The T5 may be left out (`text_encoder_3` null in model_index.json), and counts as zeros then, as in its pipeline."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    guidance_order: ClassVar[str] = "nothing first"
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    text_lengths: ClassVar[tuple[int, float]] = (1, 512)  # that the pipeline allows
    text_parts: ClassVar[tuple[str, ...]] = tuple(
        f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in SUFFIXES
    )

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "StableDiffusion3":
        family = super().load(source, model_index, config, weights)
        for suffix in SUFFIXES[:2]:
            family.check_clip(f"tokenizer{suffix}", f"text_encoder{suffix}")
        return family

    def encode_texts(self, texts: list[str]) -> Conditioning:
        pipeline = self.text_pipeline()
        if pipeline.text_encoder_3 is None:  # it asks the transformer how wide the T5's states would be
            pipeline.transformer = self.denoiser_on_meta()
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, **self.text_options
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0].float()
