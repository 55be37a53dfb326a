"""Stable Diffusion XL: a UNet on VAE latents that attends to the states of two CLIPs, and is told sizes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class StableDiffusionXL(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", the states of both text encoders side by side, (batch, tokens,
    width), "pooled_prompt_embeds", (batch, width of the second), and "time_ids", (batch, 6): height and width of the
    image as it was, top and left of the crop, height and width of what is trained on (Podell et al. 2023,
    arXiv:2307.01952, section 2.2)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    guidance_order: ClassVar[str] = "nothing first"
    denoiser_part: ClassVar[str] = "unet"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    trained_text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    has_init_noise_sigma: ClassVar[bool] = True

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "StableDiffusionXL":
        if not (model_index.get("text_encoder") or (None,))[0]:
            raise ValueError("it has no text_encoder, as the refiner of Stable Diffusion XL, which is told other sizes")
        family = super().load(source, model_index, config, weights)
        for suffix in ("", "_2"):
            family.check_clip(f"tokenizer{suffix}", f"text_encoder{suffix}")
        family.refuse_shift()
        return family

    @property
    def pipeline_options(self) -> dict[str, Any]:
        zeros = self.model_index.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}

    def describe_parts(self, *parts: str) -> dict[str, str]:
        described = super().describe_parts(*parts)
        if "text_encoder" in parts:  # latents do not depend on it
            described["force_zeros_for_empty_prompt"] = str(self.pipeline_options["force_zeros_for_empty_prompt"])
        return described

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.text_pipeline().encode_prompt(texts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encode_nothing(self) -> Conditioning:
        """Zeros, unless the checkpoint's `force_zeros_for_empty_prompt` is false."""
        empty = super().encode_nothing()
        zeros = self.pipeline_options["force_zeros_for_empty_prompt"]
        return {name: torch.zeros_like(value) for name, value in empty.items()} if zeros else empty

    def encode(self, batch: dict[str, Any], *how: Any, **more: Any) -> tuple[torch.Tensor, Conditioning]:
        """See `Family`; with the sizes of each sample."""
        latents, conditioning = super().encode(batch, *how, **more)
        return latents, conditioning | {"time_ids": batch["sizes"]}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """See `Family`; without "time_ids", of images that are as large as they were, as the pipeline has it."""
        pooled, time_ids = conditioning["pooled_prompt_embeds"], conditioning.get("time_ids")
        if time_ids is None:
            height, width = (side * self.vae_scale_factor for side in noisy_latents.shape[2:])
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(pooled), device=pooled.device)
        return denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.float()},
            return_dict=False,
        )[0].float()
