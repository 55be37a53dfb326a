"""LTX-Video: a transformer on packed latents of a VAE for videos, told when each frame is, and the states of a T5."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, LTXImageToVideoPipeline, LTXPipeline

from difftrain_utils.families.diffusers_video_family import DiffusersVideoFamily
from difftrain_utils.families.family import Conditioning


@dataclass
class LTX(DiffusersVideoFamily):
    """See `VideoFamily`; HaCohen et al. 2024, arXiv:2501.00103. Conditioning: "prompt_embeds", the T5's last states,
    (batch, tokens, width), and "prompt_embeds_mask", (batch, tokens).

    The places of tokens are seconds and pixels, so that the transformer knows the frames a second (`data.fps`)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = LTXPipeline
    image_pipeline_class: ClassVar[type[DiffusionPipeline]] = LTXImageToVideoPipeline
    takes_image_and_latents: ClassVar[bool] = False
    guidance_order: ClassVar[str] = "nothing first"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    side_multiple: ClassVar[int] = 32
    gives_sigmas: ClassVar[bool] = True
    tells_tokens: ClassVar[bool] = True

    statistics: tuple[torch.Tensor, torch.Tensor] | None = None
    """Mean and standard deviation of the latents' channels, which are among the VAE's weights."""

    @property
    def first_frames(self) -> Literal["none", "some", "all"]:
        """See `VideoFamily`: the first latents of a clip are those of its first frame where the VAE is causal."""
        return "some" if self.config_of("vae").encoder_causal else "none"

    @property
    def vae_scale_factors(self) -> tuple[int, int]:
        config = self.config_of("vae")
        scaled = 2 ** sum(config.spatio_temporal_scaling)
        frames, side = config.temporal_compression_ratio, config.spatial_compression_ratio
        return frames or config.patch_size_t * scaled, side or config.patch_size * scaled

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        config = self.config_of("transformer")
        return config.patch_size_t, config.patch_size, config.patch_size

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        if self.statistics is None:
            vae = self.part("vae")
            self.statistics = vae.latents_mean.float().clone(), vae.latents_std.float().clone()
            self.free_cached()
        return LTXPipeline._normalize_latents(latents, *self.statistics, self.config_of("vae").scaling_factor)

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, mask, _, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        (per_frame, per_side), (patch_t, patch, _) = self.vae_scale_factors, self.patch_sizes
        size = dict(zip(("num_frames", "height", "width"), noisy_latents.shape[2:], strict=True))
        output = denoiser(
            hidden_states=self.pack(noisy_latents),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps if timesteps.ndim == 1 else self.token_times(timesteps, noisy_latents),
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            **size,
            rope_interpolation_scale=(per_frame / self.fps, per_side, per_side),
            return_dict=False,
        )[0].float()
        return LTXPipeline._unpack_latents(output, *size.values(), patch, patch_t)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        patch_t, patch, _ = self.patch_sizes
        return LTXPipeline._pack_latents(latents, patch, patch_t)

    def call_options(self, prompts: list[str], guidance_scale: float) -> dict[str, object]:
        return super().call_options(prompts, guidance_scale) | {"frame_rate": self.fps}
