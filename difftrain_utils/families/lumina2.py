"""Lumina-Image 2: a single-stream transformer on VAE latents and the states of a Gemma 2."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, Lumina2Pipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import INNER_FIELDS, DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class Lumina2(DiffusersFamily):
    """See `Family`; Qin et al. 2025, arXiv:2503.21758. Conditioning: "prompt_embeds", the text encoder's last states
    but one, of the system prompt and the caption, (batch, tokens, width), and "prompt_embeds_mask", (batch, tokens)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Lumina2Pipeline
    guidance_order: ClassVar[str] = "apart"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS | {
        *("hidden_size", "num_refiner_layers", "num_kv_heads", "multiple_of", "ffn_dim_multiplier", "axes_dim_rope")
    }
    gives_sigmas: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "Lumina2":
        family = super().load(source, model_index, config, weights)
        if family.vae_scale_factor != 8:
            raise ValueError(f"vae makes 1/{family.vae_scale_factor} of the size, and a Lumina2Pipeline takes 1/8")
        return family

    @property
    def text_lengths(self) -> tuple[int, int]:
        """More than the system prompt has, and as many as the pipeline allows; and a caption has as many of the
        transformer's places, and the image the one after them."""
        return self.num_system_tokens + 1, min(512, self.config_of("transformer").axes_lens[0] - 1)

    @property
    def num_system_tokens(self) -> int:
        """The tokens before a caption's."""
        return len(self.part("tokenizer")(f"{self._pipeline_of([], None).system_prompt} <Prompt Start>").input_ids)

    def num_tokens(self, *size: int) -> int:
        """The pipeline takes the channels for the tokens when it asks for a dynamic shift: so that of any size is
        the same."""
        return self.config_of("transformer").in_channels

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def encode_nothing(self) -> Conditioning:
        """Without the system prompt, as the pipeline has it under guidance."""
        _, _, embeds, mask = self.text_pipeline().encode_prompt([""], max_sequence_length=self.text_length)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """See `Family`. The transformer takes a time from 0 at noise to 1, and gives x_0 - ε."""
        return -denoiser(
            hidden_states=noisy_latents,
            timestep=1 - timesteps / self.schedule.num_train_timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            return_dict=False,
        )[0].float()
