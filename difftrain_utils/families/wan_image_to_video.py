"""Wan's models of images to videos: a Wan whose transformer is given the first frame by channels of its own."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from diffusers.utils import pt_to_pil

from difftrain_utils.families.family import Conditioning
from difftrain_utils.families.wan import Wan

CLIP_TEXT_LENGTH = 512  # by which the transformer's attention tells captions' tokens from images', whatever they have


@dataclass
class WanImageToVideo(Wan):
    """See `Wan`. Conditioning besides: "first_frame_latents", (batch, channels, frames, height, width), those of the
    first frame with grey after it, and of Wan 2.1 "image_embeds", (batch, tokens, width), CLIP's states of it before
    its last layer. The transformer's channels are the noisy latents, a mask of the frames that are given, and the
    first frame's."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanImageToVideoPipeline
    condition_parts: ClassVar[tuple[str, ...]] = ("image_encoder", "image_processor")
    float32_parts: ClassVar[tuple[str, ...]] = ("vae", "image_encoder")  # as in the pipeline's documentation

    def check_inputs(self) -> None:
        config, factor = self.config_of("transformer"), self.vae_scale_factors[0]
        channels = 2 * self.config_of("vae").z_dim + factor
        if self.model_index.get("expand_timesteps"):
            raise ValueError("expand_timesteps: a model that is told the time of each token is a WanPipeline")
        if config.in_channels != channels:
            got = f"a {self.class_name} gives it {channels}, got {config.in_channels}"
            raise ValueError(f"transformer: in_channels: {got}")
        if self.has_image_dim and not all(map(self.has_part, self.condition_parts)):
            raise ValueError(f"transformer: image_dim: needs {' and '.join(self.condition_parts)}")
        if config.get("pos_embed_seq_len") is not None:
            raise ValueError("transformer: pos_embed_seq_len: it is to be told the last frame, too")

    @property
    def has_image_dim(self) -> bool:
        """Whether the transformer attends to CLIP's states."""
        return self.config_of("transformer").get("image_dim") is not None

    @property
    def text_lengths(self) -> tuple[int, float]:
        return (CLIP_TEXT_LENGTH, CLIP_TEXT_LENGTH) if self.has_image_dim else (1, math.inf)

    @property
    def first_frames(self) -> Literal["none", "some", "all"]:
        return "all"

    @torch.no_grad()
    def encode_first_frames(self, pixel_values: torch.Tensor) -> Conditioning:
        vae, first = self.part("vae"), pixel_values[:, :, :1]
        clip = torch.cat([first, torch.zeros_like(pixel_values[:, :, 1:])], 2)
        given = {"first_frame_latents": self.normalise(vae.encode(clip.to(vae.dtype)).latent_dist.mode().float())}
        if self.has_image_dim:
            encoder = self.part("image_encoder")
            images = self.part("image_processor")(images=pt_to_pil(first[:, :, 0]), return_tensors="pt")
            shown = images["pixel_values"].to(encoder.device, encoder.dtype)
            given["image_embeds"] = encoder(shown, output_hidden_states=True).hidden_states[-2]
        return given

    def null_first_frames(self, num_frames: int, height: int, width: int) -> Conditioning:
        frames, side = self.vae_scale_factors
        size = 1 + (num_frames - 1) // frames, height // side, width // side
        given = {"first_frame_latents": torch.zeros(1, self.config_of("vae").z_dim, *size)}
        if self.has_image_dim:
            config = self.config_of("image_encoder")
            num_tokens = 1 + (config.image_size // config.patch_size) ** 2
            given["image_embeds"] = torch.zeros(1, num_tokens, config.hidden_size)
        return given

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        latents = conditioning["first_frame_latents"]
        is_given = latents.new_zeros(len(latents), self.vae_scale_factors[0], *latents.shape[2:])
        is_given[:, :, 0] = 1  # once for each of the frames that latents stand for
        if self.has_image_dim:
            denoiser = partial(denoiser, encoder_hidden_states_image=conditioning["image_embeds"])
        return super().predict(denoiser, torch.cat([noisy_latents, is_given, latents], 1), timesteps, conditioning)

    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        """See `ImageFamily`. CLIP's processor keeps the name that the checkpoint has for it, which is not that of the
        class that transformers makes of it."""
        pipeline = super().pipeline(denoiser)
        if self.has_part("image_processor"):
            pipeline.register_to_config(image_processor=tuple(self.model_index["image_processor"]))
        return pipeline
