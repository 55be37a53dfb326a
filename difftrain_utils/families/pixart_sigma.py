"""PixArt-Σ: a transformer on VAE latents that attends to the states of a T5."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class PixArtSigma(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the T5's last hidden states, (batch, tokens, width), and
    "prompt_embeds_mask", (batch, tokens) (Chen et al. 2024, arXiv:2403.04692).

    Of the transformer's output the second half, if there is one, is a variance and not trained."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtSigmaPipeline
    guidance_order: ClassVar[str] = "nothing first"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    has_init_noise_sigma: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "PixArtSigma":
        family = super().load(source, model_index, config, weights)
        if family.denoiser_on_meta().use_additional_conditions:
            raise ValueError("transformer: use_additional_conditions: a PixArtSigmaPipeline tells it no sizes")
        return family

    def describe_parts(self, *parts: str) -> dict[str, str]:
        """See `Family`. Captions are cleaned where the libraries for it are installed, as in the pipeline."""
        cleans = is_bs4_available() and is_ftfy_available()
        return super().describe_parts(*parts) | {"clean_caption": str(cleans)}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Times `scaling_factor`, which is all that its pipeline undoes."""
        return latents * self.config_of("vae").scaling_factor

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, clean_caption=True, **self.text_options
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
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]].float()
