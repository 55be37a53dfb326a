"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents that attends to CLIP's text states."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from difftrain_utils.config import Config
from difftrain_utils.errors import InputError
from difftrain_utils.keyed_random import seed_for
from difftrain_utils.noise_schedule import build_schedulers


@dataclass
class StableDiffusion:
    """The parts of a checkpoint, and what the training loop and evaluation do with them."""

    source: str
    """The folder or hub name that it was loaded from, at `revision` and `variant`."""
    revision: str | None
    variant: str | None
    denoiser: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: diffusers.SchedulerMixin
    """The noise schedule to train with."""
    scheduler: diffusers.SchedulerMixin
    """The sampler of the same schedule, for pipelines."""

    @classmethod
    def load(cls, source: str, model_index: dict, config: Config, init_seed: int | None) -> "StableDiffusion":
        """Load all parts in float32 on the CPU; the denoiser starts from `init_seed` unless that is None."""
        revision, variant = config.model.revision, config.model.variant
        at = {"revision": revision}
        scheduler_class = getattr(diffusers, model_index["scheduler"][1])
        scheduler = _load_part(scheduler_class.from_pretrained, source, "scheduler", **at)
        noise_scheduler, scheduler = build_schedulers(scheduler_class, scheduler.config, config)
        if init_seed is None:
            denoiser = _load_part(UNet2DConditionModel.from_pretrained, source, "unet", variant=variant, **at)
        else:
            unet_config = _load_part(UNet2DConditionModel.load_config, source, "unet", **at)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(init_seed, "weights", 0))
                denoiser = UNet2DConditionModel.from_config(unet_config)
        vae, text_encoder, tokenizer = cls._load_frozen(source, revision, variant)
        vae.use_slicing = config.model.vae_slicing
        if len(tokenizer) != text_encoder.config.vocab_size:  # transformers makes an empty one where files are missing
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, text_encoder {text_encoder.config.vocab_size}")
        return cls(
            source,
            revision,
            variant,
            denoiser,
            vae,
            text_encoder,
            tokenizer,
            noise_scheduler=noise_scheduler,
            scheduler=scheduler,
        )

    @staticmethod
    def _load_frozen(source: str, revision, variant) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
        at = {"revision": revision, "variant": variant}
        vae = _load_part(AutoencoderKL.from_pretrained, source, "vae", **at)
        text_encoder = _load_part(CLIPTextModel.from_pretrained, source, "text_encoder", dtype=torch.float32, **at)
        tokenizer = StableDiffusion.load_tokenizer(source, revision)
        return vae.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False), tokenizer

    @staticmethod
    def load_tokenizer(source: str, revision: str | None) -> CLIPTokenizer:
        return _load_part(CLIPTokenizer.from_pretrained, source, "tokenizer", revision=revision)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """All that has weights, by the checkpoint's names."""
        return {"unet": self.denoiser, "vae": self.vae, "text_encoder": self.text_encoder}

    def check_resolution(self, resolution: int) -> None:
        """Raise InputError unless the VAE and the UNet can halve an image of this side as often as they do."""
        multiple = 2 ** (len(self.vae.config.block_out_channels) + len(self.denoiser.config.block_out_channels) - 2)
        if resolution % multiple:
            raise InputError(f"data.resolution: {self.source} needs a multiple of {multiple}, got {resolution}")

    def move_frozen_parts(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        torch.nn.Module.to(self.vae, device, weight_dtype)  # diffusers' own `to` warns of an empty list of modules
        self.text_encoder.to(device, weight_dtype)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents drawn from the VAE's posterior by `noise`: (batch, 4, H/8, W/8), float32.

        `noise` must have the latents' shape: see `latent_shape`.
        """
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * noise
        return latents * self.vae.config.scaling_factor

    def latent_shape(self, pixel_values: torch.Tensor) -> tuple[int, int, int]:
        """The shape of one image's latents, (channels, height, width)."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, pixel_values.shape[-2] // factor, pixel_values.shape[-1] // factor

    @torch.no_grad()
    def encode_prompts(self, captions: list[str]) -> torch.Tensor:
        """The text encoder's last hidden states: (batch, tokens, width). Longer captions are cut."""
        input_ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(input_ids.to(self.text_encoder.device)).last_hidden_state

    def predict(self, denoiser, noisy_latents, timesteps, conditioning) -> torch.Tensor:
        """The denoiser's output for noisy latents, float32, of their shape; conditioning is from encode_prompts."""
        return denoiser(noisy_latents, timesteps, conditioning).sample.float()

    def pipeline(self, denoiser: torch.nn.Module) -> StableDiffusionPipeline:
        """A pipeline of the parts in memory around `denoiser`, to generate with."""
        return self._pipeline(denoiser, self.vae, self.text_encoder, self.tokenizer)

    def save_pipeline(self, folder: Path, denoiser: torch.nn.Module) -> None:
        """Write a pipeline around `denoiser` with the checkpoint's own frozen parts, in float32 and unused (a
        tokenizer that has padded would be saved with its padding)."""
        self._pipeline(denoiser, *self._load_frozen(self.source, self.revision, self.variant)).save_pretrained(folder)

    def _pipeline(self, denoiser, vae, text_encoder, tokenizer) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=denoiser,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _load_part(load: Callable[..., Any], source: str, name: str, **kwargs):
    try:
        return load(source, subfolder=name, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
