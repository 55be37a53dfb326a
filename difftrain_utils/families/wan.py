"""Wan 2.1 and 2.2: a transformer on the latents of a causal VAE for videos that attends to the states of a UMT5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from diffusers.utils import is_ftfy_available

from difftrain_utils.config.objective import TimestepsConfig
from difftrain_utils.config.text_to_video import TextToVideoConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_video_family import DiffusersVideoFamily
from difftrain_utils.families.family import Conditioning, Weights
from difftrain_utils.families.lora import save_adapters

EXPERTS = ("transformer", "transformer_2")  # of high noise, and of low


@dataclass
class Wan(DiffusersVideoFamily):
    """See `VideoFamily`; Wan team 2025, arXiv:2503.20314. Conditioning: "prompt_embeds", the text encoder's last
    states, (batch, tokens, width), and "prompt_embeds_mask", (batch, tokens). The transformer is told no mask: where
    there is no token it sees zeros, and how many of these there are counts.

    Of the two experts of 2.2's large models the one whose noise levels `timesteps` asks for is trained; the other one
    is loaded when a pipeline is made, and dropped with the parts whose work is cached."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanPipeline
    image_pipeline_class: ClassVar[type[DiffusionPipeline]] = WanImageToVideoPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    side_multiple: ClassVar[int] = 16
    float32_parts: ClassVar[tuple[str, ...]] = ("vae",)  # as in the authors' code

    expert: str = EXPERTS[0]
    """The name of the part that is trained."""

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: TextToVideoConfig, weights: Weights) -> "Wan":
        family = super().load(source, model_index, config, weights)
        family.check_inputs()
        family.expert = family.expert_for(config.timesteps)
        return family

    def check_inputs(self) -> None:
        """Raise ValueError unless the transformer takes what the pipeline gives it."""
        config, channels = self.config_of("transformer"), self.config_of("vae").z_dim
        if config.get("image_dim") is not None:
            raise ValueError("transformer: image_dim: a WanPipeline tells it of no image")
        if config.in_channels != channels:
            raise ValueError(f"transformer: in_channels: a WanPipeline gives it {channels}, got {config.in_channels}")

    @property
    def first_frames(self) -> Literal["none", "some", "all"]:
        """See `VideoFamily`: only models that are told the time of each token."""
        return "some" if self.model_index.get("expand_timesteps") else "none"

    @property
    def denoiser_part(self) -> str:
        return self.expert

    @property
    def guidance_order(self) -> str | None:
        """See `ImageFamily`. Of two experts each is asked for some of the steps, which nothing that stands in for one
        knows."""
        return None if self.has_part(EXPERTS[1]) else "apart"

    @property
    def boundary(self) -> float | None:
        """The noise level between the two experts, as a fraction of the schedule; None of models of one."""
        return self.model_index.get("boundary_ratio") if self.has_part(EXPERTS[1]) else None

    def expert_for(self, timesteps: TimestepsConfig) -> str:
        """The name of the part that is for these noise levels. Raises InputError if both are."""
        low, high = timesteps.min, timesteps.max
        if self.boundary is None or low >= self.boundary:
            return EXPERTS[0]
        if high > self.boundary:
            raise InputError(
                f"timesteps.min: {self.name} has two experts, of which one is trained: give timesteps.min "
                f"{self.boundary} for that of high noise or timesteps.max {self.boundary} for that of low, got from "
                f"{low} to {high}"
            )
        return EXPERTS[1]

    @property
    def noise_range(self) -> tuple[float, float]:
        """See `ImageFamily`: the expert's side of the boundary."""
        if self.boundary is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if self.expert == EXPERTS[0] else (0.0, self.boundary)

    @property
    def other_experts(self) -> list[str]:
        """The part that is frozen, where there are two."""
        return [part for part in EXPERTS if part != self.expert and self.has_part(part)]

    @property
    def pipeline_options(self) -> dict[str, Any]:
        names = ("boundary_ratio", "expand_timesteps")
        return {name: self.model_index[name] for name in names if name in self.model_index}

    @property
    def vae_scale_factors(self) -> tuple[int, int]:
        config = self.config_of("vae")
        return config.scale_factor_temporal, config.scale_factor_spatial

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        return tuple(self.config_of(self.expert).patch_size)

    @property
    def tile_size(self) -> tuple[int, int] | None:
        """See `DiffusersFamily`: tiles are cut out of what the VAE has patched."""
        patch = self.config_of("vae").patch_size or 1
        return tuple(patch * side for side in super().tile_size)

    def digests(self, denoiser: torch.nn.Module) -> dict[str, str]:
        return super().digests(denoiser) | {part: self._digest(part) for part in self.other_experts}

    def describe_parts(self, *parts: str) -> dict[str, str]:
        """See `Family`. Captions are cleaned where the library for it is installed, as in the pipeline."""
        return super().describe_parts(*parts) | {"clean_caption": str(is_ftfy_available())}

    def encode_texts(self, texts: list[str]) -> Conditioning:
        embeds, _ = self.text_pipeline().encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": embeds.any(-1)}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """See `DiffusersFamily`; times the inverse, as in the pipeline, to the last bit."""
        config, per_channel = self.config_of("vae"), (-1, *[1] * (latents.ndim - 2))
        mean, std = (latents.new_tensor(config[name]).view(per_channel) for name in ("latents_mean", "latents_std"))
        return (latents - mean) * (1.0 / std)

    def sample_latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """See `Family`. Of a model that may be given first frames by their time, all of them are the mode of their
        posterior, as the pipeline takes those that are given: which these are in training is not known here."""
        if self.first_frames == "some":
            noise = torch.cat([torch.zeros_like(noise[:, :, :1]), noise[:, :, 1:]], 2)
        return super().sample_latents(moments, noise)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        embeds = conditioning["prompt_embeds"]
        if self.model_index.get("expand_timesteps"):
            timesteps = self.token_times(timesteps, noisy_latents)
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            # caches leave out the zeros at the end of all captions
            encoder_hidden_states=torch.nn.functional.pad(embeds, (0, 0, 0, self.text_length - embeds.shape[1])),
            return_dict=False,
        )[0].float()

    def pipeline(self, denoiser: torch.nn.Module) -> DiffusionPipeline:
        pipeline = super().pipeline(denoiser)
        pipeline.register_modules(**{part: self.part(part) for part in self.other_experts})
        return pipeline

    def free_cached(self) -> None:
        """See `Family`: the other expert, too, which evaluations alone are made with."""
        super().free_cached()
        for part in self.other_experts:
            self._parts.pop(part, None)

    def save_lora(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """See `Family`. Those of the expert of low noise are loaded by `load_lora_weights(folder,
        load_into_transformer_2=True)`, which looks for them under the same name."""
        self.check_denoiser(denoiser)
        save_adapters(folder, {EXPERTS[0]: denoiser})
