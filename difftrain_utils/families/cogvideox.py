"""CogVideoX: a transformer on the latents of a causal VAE for videos, in one row with the states of a T5."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline

from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import INNER_FIELDS
from difftrain_utils.families.diffusers_video_family import DiffusersVideoFamily
from difftrain_utils.families.family import Conditioning, Weights


@dataclass
class CogVideoX(DiffusersVideoFamily):
    """See `VideoFamily`; Yang et al. 2024, arXiv:2408.06072. Conditioning: "prompt_embeds", the T5's last states,
    (batch, tokens, width), of which those of padding count like any other.

    The places of tokens are added to them (2B) or rotate them (5B and 1.5). A token of 1.5 is of two frames of latents:
    where their number is odd, the first one is there twice, as its authors train it; the pipeline leaves one out."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = CogVideoXPipeline
    guidance_order: ClassVar[str] = "nothing first"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS - {"attention_head_dim"}  # by which places are told
    has_init_noise_sigma: ClassVar[bool] = True
    side_multiple: ClassVar[int] = 8

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: TextToVideoConfig, weights: Weights) -> "CogVideoX":
        family = super().load(source, model_index, config, weights)
        family.refuse_shift()
        own = family.config_of("transformer")
        if own.ofs_embed_dim is not None or own.in_channels != own.out_channels:
            raise ValueError("transformer: it is told of an image, of which a CogVideoXPipeline tells it nothing")
        return family

    @property
    def vae_scale_factors(self) -> tuple[int, int]:
        return self.config_of("vae").temporal_compression_ratio, self.vae_scale_factor

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        config = self.config_of("transformer")
        return config.patch_size_t or 1, config.patch_size, config.patch_size

    @property
    def frame_multiple(self) -> int:
        """The VAE decodes two frames of latents at a time, and of an even number makes more frames than there were."""
        return 2 * self.vae_scale_factors[0]

    @property
    def text_lengths(self) -> tuple[int, float]:
        """Added places are those of so many tokens of text alone."""
        config = self.config_of("transformer")
        length = config.max_text_seq_length
        return super().text_lengths if config.use_rotary_positional_embeddings else (length, length)

    def check_size(self, height: int, width: int, name: str) -> None:
        """See `Family`. 1.5 knows no places outside of its largest size."""
        super().check_size(height, width, name)
        config = self.config_of("transformer")
        most = [side * self.vae_scale_factor for side in (config.sample_height, config.sample_width)]
        if config.patch_size_t is not None and (height > most[0] or width > most[1]):
            raise InputError(f"{name}: {self.name} takes at most {most[0]} x {most[1]}, got {height} x {width}")

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Times `scaling_factor`, which is all that its pipeline undoes."""
        return latents * self.config_of("vae").scaling_factor

    def sample_latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        latents = super().sample_latents(moments, noise)
        num_missing = -latents.shape[2] % self.patch_sizes[0]
        return torch.cat([*[latents[:, :, :1]] * num_missing, latents], 2)

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        output = denoiser(
            hidden_states=self.pack(noisy_latents),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps,
            image_rotary_emb=self.rotary_embeddings(*noisy_latents.shape[2:], noisy_latents.device),
            return_dict=False,
        )[0].float()
        return output.transpose(1, 2)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2)  # frames, then channels

    def rotary_embeddings(
        self, num_frames: int, height: int, width: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the places of all tokens of latents of this size, as the pipeline makes them; None where
        places are added."""
        config, side = self.config_of("transformer"), self.vae_scale_factor
        if not config.use_rotary_positional_embeddings:
            return None
        pipeline = SimpleNamespace(vae_scale_factor_spatial=side, transformer=SimpleNamespace(config=config))
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, height * side, width * side, num_frames, device
        )
