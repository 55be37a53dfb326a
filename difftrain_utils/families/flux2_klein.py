"""Flux.2 klein: an MMDiT on VAE latents in 2 × 2 patches, normalised by a batch norm, and states of a Qwen3."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from difftrain_utils.config.config import Config
from difftrain_utils.families.diffusers_family import JOINT_ATTENTION, DiffusersFamily, caption_start
from difftrain_utils.families.family import Conditioning, Weights

# A shift of this family depends on the number of steps, too, and training has none: it takes what the pipeline takes.
NUM_STEPS = inspect.signature(Flux2KleinPipeline.__call__).parameters["num_inference_steps"].default


@dataclass
class Flux2Klein(DiffusersFamily):
    """See `Family`. Conditioning: "prompt_embeds", states of three layers of the Qwen3 side by side, (batch, tokens,
    3 · width), which no mask goes with.

    Latents are patches: 4 times as many channels as the VAE has, at half of its sides."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    guidance_order: ClassVar[str] = "apart"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    gives_sigmas: ClassVar[bool] = True

    _statistics: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    """Mean and standard deviation of patches, each (1, 4 · channels, 1, 1), float32."""

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "Flux2Klein":
        """See `Family`. The statistics are weights of the VAE, read before that is rounded, or freed; without weights,
        they are any."""
        family = super().load(source, model_index, config, weights)
        norm, eps = family.part("vae").bn, family.config_of("vae").batch_norm_eps
        mean, variance = (values.view(1, -1, 1, 1).clone() for values in (norm.running_mean, norm.running_var))
        if weights == "none":
            mean, variance = (torch.zeros(values.shape) for values in (mean, variance))
        family._statistics = mean, (variance + eps).sqrt()
        family.free_cached()
        return family

    @property
    def text_lengths(self) -> tuple[int, float]:
        """More than there are before a caption."""
        return caption_start(self.part("tokenizer"), enable_thinking=False) + 1, math.inf

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"is_distilled": self.model_index.get("is_distilled", False)}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The attention's, which in single blocks is one layer with the MLP; their `to_out` is a layer itself."""
        numbers = range(self.config_of("transformer").num_single_layers)
        outs = (f"single_transformer_blocks.{i}.attn.to_out" for i in numbers)
        return (*JOINT_ATTENTION, "to_qkv_mlp_proj", *outs)

    @property
    def vae_scale_factor(self) -> int:
        """How much smaller patches are than images."""
        return 2 * super().vae_scale_factor

    def mu(self, *size: int) -> float:
        return compute_empirical_mu(self.num_tokens(*size), NUM_STEPS)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Patches of the VAE's latents, (batch, channels, height, width), by their statistics: (batch, 4 · channels,
        height / 2, width / 2)."""
        mean, std = (values.to(latents.device) for values in self._statistics)
        return (Flux2KleinPipeline._patchify_latents(latents) - mean) / std

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, _ = self.text_pipeline().encode_prompt(texts, **self.text_options)
        return {"prompt_embeds": embeds}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        embeds, device = conditioning["prompt_embeds"], noisy_latents.device
        output = denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy_latents),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeds,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds).to(device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy_latents).to(device),
            return_dict=False,
        )[0]
        return output.mT.reshape(noisy_latents.shape).float()  # the tokens are in order
