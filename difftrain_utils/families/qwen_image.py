"""Qwen-Image: an MMDiT on packed latents of a VAE for videos and the states of a Qwen2.5-VL."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, QwenImagePipeline

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class QwenImage(DiffusersFamily):
    """See `Family`; Wu et al. 2025, arXiv:2508.02324. Conditioning: "prompt_embeds", the text encoder's last states
    without those of the template before the caption, (batch, tokens, width), and "prompt_embeds_mask",
    (batch, tokens)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    guidance_order: ClassVar[str] = "apart"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_lengths: ClassVar[tuple[int, float]] = (1, 1024)  # that the pipeline allows
    gives_sigmas: ClassVar[bool] = True

    trims_captions: bool = True
    """To the longest of a batch, as the pipeline; not where each length would be compiled."""

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: Config, weights: Weights) -> "QwenImage":
        if config.train.channels_last:
            raise InputError("train.channels_last: not for the weights of a VAE for videos, got true; leave it false")
        family = super().load(source, model_index, config, weights)
        if family.has_guidance_embedding:
            raise ValueError("transformer: guidance_embeds is true, which its class takes and cannot run")
        family.trims_captions = config.train.compile is None
        return family

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. The last block's new states of the text are not used: what only they depend on is frozen,
        because DDP waits for the gradient of all that is trained."""
        denoiser = super().load_denoiser()
        last = denoiser.transformer_blocks[-1]
        for module in (last.attn.to_add_out, last.txt_mlp):
            module.requires_grad_(False)
        return denoiser

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.config_of("vae").temperal_downsample)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `Family`: of videos of one frame."""
        return super().encode_images(pixel_values.unsqueeze(2))[:, :, :, 0]

    def encode_texts(self, texts: list[str]) -> Conditioning:
        """Beside a text that is too long: the pipeline pads to the longest, and so always to the same length."""
        pipeline = self.text_pipeline()
        pipeline.tokenizer_max_length = self.text_length  # instead of cutting the states of more tokens
        embeds, mask = pipeline.encode_prompt([*texts, " a" * self.text_length], max_sequence_length=self.text_length)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        return {"prompt_embeds": embeds[:-1], "prompt_embeds_mask": mask[:-1]}

    def encode_nothing(self) -> Conditioning:
        """As the negative prompt of the model's authors, which `call_options` gives the pipeline."""
        return self.encode_texts([" "])

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        batch, channels, height, width = noisy_latents.shape
        embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"]
        if self.trims_captions:
            longest = max(mask.sum(1).tolist())
            embeds, mask = embeds[:, :longest], mask[:, :longest]
            mask = None if mask.all() else mask
        output = denoiser(
            hidden_states=QwenImagePipeline._pack_latents(noisy_latents, batch, channels, height, width),
            timestep=timesteps / 1000,
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=embeds,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            attention_kwargs={},
            return_dict=False,
        )[0].float()
        return QwenImagePipeline._unpack_latents(output, height, width, 1)[:, :, 0]

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, Any]:
        options = {"prompt": prompts, "true_cfg_scale": guidance_scale}
        return options | ({"negative_prompt": [" "] * len(prompts)} if guidance_scale > 1 else {})
