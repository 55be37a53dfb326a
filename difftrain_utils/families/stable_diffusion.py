"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents that attends to CLIP's text states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import DiffusersFamily, encode_alone
from difftrain_utils.families.family import Conditioning


@dataclass
class StableDiffusion(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the text encoder's last hidden states, (batch, tokens, width)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    denoiser_part: ClassVar[str] = "unet"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    has_init_noise_sigma: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, from_scratch: bool) -> "StableDiffusion":
        family = super().load(source, model_index, config, from_scratch)
        text_config = family.config_of("text_encoder")
        num_tokens, vocab_size = len(family.part("tokenizer")), text_config.vocab_size
        if num_tokens != vocab_size:  # transformers makes an empty one where files are missing
            raise ValueError(f"tokenizer has {num_tokens} tokens, text_encoder {vocab_size}")
        limit, positions = family.part("tokenizer").model_max_length, text_config.max_position_embeddings
        if not 2 <= limit <= positions:
            raise ValueError(f"tokenizer cuts captions at {limit} tokens, text_encoder takes {positions}")
        if shift := family.config_of("vae").get("shift_factor"):
            raise ValueError(f"vae has a shift_factor, {shift}, which a StableDiffusionPipeline does not undo")
        return family

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @property
    def size_multiple(self) -> int:
        """What VAE and UNet can halve as often as they do."""
        parts = [self.config_of(part) for part in (self.image_part, self.denoiser_part)]
        return 2 ** sum(len(config.block_out_channels) - 1 for config in parts)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Times `scaling_factor`, as its pipeline undoes it; that knows of no `shift_factor` and no mean."""
        return latents * self.config_of("vae").scaling_factor

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str | None]) -> Conditioning:
        """See `Family`. Longer captions are cut; none is the empty one."""
        tokenizer, text_encoder = self.part("tokenizer"), self.part("text_encoder")
        input_ids = tokenizer(
            [caption or "" for caption in captions],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {
            "prompt_embeds": encode_alone(
                lambda ids: text_encoder(ids).last_hidden_state, input_ids, text_encoder.device
            )
        }

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        return denoiser(noisy_latents, timesteps, conditioning["prompt_embeds"]).sample.float()
