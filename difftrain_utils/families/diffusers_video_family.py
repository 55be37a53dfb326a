"""What all families of video models in diffusers' format have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from difftrain_utils.config.text_to_video import TextToVideoConfig, VideoNoiseConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Weights
from difftrain_utils.media.video import Clip
from difftrain_utils.objective.noise import correlate_frames


@dataclass
class DiffusersVideoFamily(DiffusersFamily):
    """A `VideoFamily` of checkpoints in diffusers' format: a subclass says what it says of a `DiffusersFamily`, and how
    the VAE and the denoiser cut a video up (`vae_scale_factors`, `patch_sizes`)."""

    side_multiple: ClassVar[int]
    """What the pipeline's own check wants sides to be multiples of."""

    fps: float = 0.0
    """Frames a second of all clips."""
    noise: VideoNoiseConfig = field(default_factory=VideoNoiseConfig)
    """That of the run, whose frames may be correlated: `generate` begins with such."""

    @classmethod
    def load(
        cls, source: str, model_index: dict[str, Any], config: TextToVideoConfig, weights: Weights
    ) -> "DiffusersVideoFamily":
        if config.train.channels_last:
            raise InputError("train.channels_last: not for the weights of a VAE for videos, got true; leave it false")
        family = super().load(source, model_index, config, weights)
        family.fps, family.noise = config.data.fps, config.noise
        return family

    @property
    def vae_scale_factors(self) -> tuple[int, int]:
        """How many frames, after the first, are one of latents; and how much smaller their sides are."""
        raise NotImplementedError

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        """Frames, height and width of the denoiser's tokens in latents."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        config = self.config_of(self.image_part)
        return config.get("latent_channels") or config.z_dim

    @property
    def frame_multiple(self) -> int:
        frames, _ = self.vae_scale_factors
        return frames * self.patch_sizes[0]

    @property
    def size_multiple(self) -> int:
        _, side = self.vae_scale_factors
        return math.lcm(side * self.patch_sizes[1], side * self.patch_sizes[2], self.side_multiple)

    def check_frames(self, num_frames: int, name: str) -> None:
        multiple = self.frame_multiple
        if num_frames % multiple != 1 % multiple:
            below = (num_frames - 1) // multiple * multiple + 1
            raise InputError(
                f"{name}: {self.source} takes {multiple} n + 1 frames, such as {max(below, 1)} or {below + multiple}, "
                f"got {num_frames}"
            )

    def num_tokens(self, *size: int) -> int:
        """Into how many tokens the denoiser cuts latents of this size (frames, height, width)."""
        return math.prod(length // patch for length, patch in zip(size, self.patch_sizes, strict=True))

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        num_frames: int,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Clip]:
        pipeline = self.pipeline(denoiser)
        options = self.picture_options(
            pipeline, list(prompts), height, width, num_inference_steps, guidance_scale, guidance_rescale
        )
        options |= self.first_noise(num_frames, height, width, generators)
        made = pipeline(**options, num_frames=num_frames, generator=list(generators), output_type="pil").frames
        return [Clip(frames, self.fps) for frames in made]

    def first_noise(
        self, num_frames: int, height: int, width: int, generators: Sequence[torch.Generator]
    ) -> dict[str, torch.Tensor]:
        """What a call of the pipeline is told so that it begins with noise as training has it: for each generator its
        `latents` if their frames are correlated (`correlate_frames`), else nothing."""
        if self.noise.frame_correlation is None:
            return {}
        per_frame, per_side = self.vae_scale_factors
        frames = (num_frames - 1) // per_frame + 1
        shape = self.latent_channels, 1 + frames, height // per_side, width // per_side
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return {"latents": self.pack(correlate_frames(self.noise, noise))}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the pipeline's call takes them."""
        return latents
