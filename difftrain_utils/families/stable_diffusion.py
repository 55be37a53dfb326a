"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents that attends to CLIP's text states."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class StableDiffusion(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the text encoder's last hidden states, (batch, tokens, width)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    guidance_order: ClassVar[str] = "nothing first"
    denoiser_part: ClassVar[str] = "unet"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    has_init_noise_sigma: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "StableDiffusion":
        family = super().load(source, model_index, config, weights)
        family.check_clip("tokenizer", "text_encoder")
        family.refuse_shift()
        return family

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Times `scaling_factor`, as its pipeline undoes it; that knows of no `shift_factor` and no mean."""
        return latents * self.config_of("vae").scaling_factor

    def encode_texts(self, texts: list[str]) -> Conditioning:
        """Longer captions are cut."""
        tokenizer, text_encoder = self.part("tokenizer"), self.part("text_encoder")
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        has_mask = getattr(text_encoder.config, "use_attention_mask", False)
        states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if has_mask else None)
        return {"prompt_embeds": states.last_hidden_state}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        return denoiser(noisy_latents, timesteps, conditioning["prompt_embeds"]).sample.float()
