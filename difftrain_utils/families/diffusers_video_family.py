"""What all families of video models in diffusers' format have in common."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from difftrain_utils.config.text_to_video import TextToVideoConfig, VideoNoiseConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Conditioning, Weights
from difftrain_utils.media.video import Clip
from difftrain_utils.objective.noise import correlate_frames
from difftrain_utils.objective.schedule import append_dims


@dataclass
class DiffusersVideoFamily(DiffusersFamily):
    """A `VideoFamily` of checkpoints in diffusers' format: a subclass says what it says of a `DiffusersFamily`, and how
    the VAE and the denoiser cut a video up (`vae_scale_factors`, `patch_sizes`)."""

    side_multiple: ClassVar[int]
    """What the pipeline's own check wants sides to be multiples of."""
    image_pipeline_class: ClassVar[type[DiffusionPipeline] | None] = None
    """The pipeline, of the same parts, that makes a clip of its first frame; None: there is none."""
    takes_image_and_latents: ClassVar[bool] = True
    """Whether it takes the first frame and the noise to begin with, `latents`, both."""

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
        family.check_first_frames(config)
        return family

    @property
    def first_frames(self) -> Literal["none", "some", "all"]:
        """See `VideoFamily`."""
        return "none" if self.image_pipeline_class is None else "some"

    def check_first_frames(self, config: TextToVideoConfig) -> None:
        """Raise InputError unless the model can be given the first frames that the config asks for, with its noise."""
        probability, correlation = config.model.first_frame_probability, config.noise.frame_correlation
        reasons = {
            "none": "is given no first frame",
            "all": "is given each first frame, by channels of its own; leave it out",
        }
        reason = reasons.get(self.first_frames)
        if self.schedule.path == "ddpm":
            reason = reason or "on the path ddpm has no time without noise"
        if probability and reason:
            raise InputError(f"model.first_frame_probability: a {self.class_name} {reason}, got {probability}")
        if correlation and not self.takes_image_and_latents and (probability or config.evaluation.first_frames):
            raise InputError(
                "noise.frame_correlation: cannot go with model.first_frame_probability and evaluation.first_frames, "
                f"because {self.image_pipeline_class.__name__} takes no image if it is given its noise, "
                f"got {correlation!r}"
            )

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
                f"{name}: {self.name} takes {multiple} n + 1 frames, such as {max(below, 1)} or {below + multiple}, "
                f"got {num_frames}"
            )

    def num_tokens(self, *size: int) -> int:
        """Into how many tokens the denoiser cuts latents of this size (frames, height, width)."""
        return math.prod(length // patch for length, patch in zip(size, self.patch_sizes, strict=True))

    def encode_first_frames(self, pixel_values: torch.Tensor) -> Conditioning:
        """See `VideoFamily`."""
        return {}

    def null_first_frames(self, num_frames: int, height: int, width: int) -> Conditioning:
        """What `encode_first_frames` gives of one clip of this size, as zeros, without the encoders."""
        return {}

    def encode(
        self,
        batch: dict[str, Any],
        seed: int,
        text_encoders: torch.nn.Module | None = None,
        purpose: str = "vae_noise",
    ) -> tuple[torch.Tensor, Conditioning]:
        latents, conditioning = super().encode(batch, seed, text_encoders, purpose)
        given = batch.get("first_frame", {}) if "moments" in batch else self.encode_first_frames(batch["pixel_values"])
        return latents, conditioning | given

    def token_times(self, timesteps: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The time of each token of latents (batch, channels, frames, height, width), (batch, tokens), of those of
        samples (batch,) or of frames (batch, 1, frames, 1, 1)."""
        size = [length // patch for length, patch in zip(latents.shape[2:], self.patch_sizes, strict=True)]
        times = append_dims(timesteps, latents)[:, 0, :: self.patch_sizes[0]]
        return times.expand(len(latents), *size).flatten(1)

    def image_pipeline(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline that makes a clip of its first frame, of the parts of one of the family's."""
        if isinstance(pipeline, self.image_pipeline_class):
            return pipeline
        pipeline = self.on_device(self.image_pipeline_class)(**pipeline.components, **self.pipeline_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

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
        first_frames: Sequence[Image.Image] | None = None,
    ) -> list[Clip]:
        """See `VideoFamily`. With first frames a clip at a time: Wan's pipeline takes one image for all prompts."""
        if first_frames is None:
            pipeline, lots = self.pipeline(denoiser), [(list(prompts), list(generators), {})]
        else:
            pipeline = self.image_pipeline(self.pipeline(denoiser))
            given = zip(prompts, generators, first_frames, strict=True)
            lots = [([prompt], [generator], {"image": image}) for prompt, generator, image in given]
        made = []
        for lot, of_lot, image in lots:
            options = self.picture_options(
                pipeline, lot, height, width, num_inference_steps, guidance_scale, guidance_rescale
            )
            options |= image | self.first_noise(num_frames, height, width, of_lot)
            made += pipeline(**options, num_frames=num_frames, generator=of_lot, output_type="pil").frames
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
        frames += -frames % self.patch_sizes[0]
        shape = self.latent_channels, 1 + frames, height // per_side, width // per_side
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return {"latents": self.pack(correlate_frames(self.noise, noise))}

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the pipeline's call takes them."""
        return latents
