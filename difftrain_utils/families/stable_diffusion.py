"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents that attends to CLIP's text states."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from difftrain_utils.config.config import Config
from difftrain_utils.errors import InputError, blame, one_line
from difftrain_utils.families.samplers import build_schedulers
from difftrain_utils.files import file_digest, part_digest, weights_digest
from difftrain_utils.keyed_random import seed_for


@dataclass
class StableDiffusion:
    """The parts of a checkpoint, and what the training loop and evaluation do with them."""

    source: str
    """The folder or hub name that it is loaded from, at `revision` and `variant`."""
    revision: str | None
    variant: str | None
    denoiser: UNet2DConditionModel
    tokenizer: CLIPTokenizer
    noise_scheduler: diffusers.SchedulerMixin
    """The noise schedule to train with."""
    scheduler: diffusers.SchedulerMixin
    """The sampler of the same schedule, for pipelines."""
    vae_slicing: bool = False
    channels_last: bool = False
    """The VAE's; see `train.channels_last`."""
    device: torch.device | str = "cpu"
    """Of the frozen parts, which are loaded when they are first used: in `weight_dtype`, not to be trained."""
    weight_dtype: torch.dtype = torch.float32
    cached: tuple[str, ...] = ()
    """The frozen parts that training does without: their work is cached."""

    @classmethod
    def load(cls, source: str, model_index: dict, config: Config, init_seed: int | None) -> "StableDiffusion":
        """Load the parts in float32 on the CPU, but for encoders whose work is cached; the denoiser starts from
        `init_seed` unless that is None."""
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
        family = cls(
            source,
            revision,
            variant,
            denoiser,
            cls.load_tokenizer(source, revision),
            noise_scheduler=noise_scheduler,
            scheduler=scheduler,
            vae_slicing=config.model.vae_slicing,
            channels_last=config.train.channels_last,
        )
        vocab_size = _load_part(CLIPTextConfig.from_pretrained, source, "text_encoder", **at).vocab_size
        if len(family.tokenizer) != vocab_size:  # transformers makes an empty one where files are missing
            raise ValueError(f"tokenizer has {len(family.tokenizer)} tokens, text_encoder {vocab_size}")
        is_cached = {"vae": config.data.cache_latents, "text_encoder": config.data.cache_text}
        family.cached = tuple(part for part in is_cached if is_cached[part])
        for part in is_cached.keys() - family.cached:
            getattr(family, part)
        return family

    @cached_property
    def vae(self) -> AutoencoderKL:
        """Loaded when first asked for, as training from cached latents does without."""
        vae = _load_part(AutoencoderKL.from_pretrained, self.source, "vae", **self._at).eval().requires_grad_(False)
        vae.use_slicing = self.vae_slicing
        if self.channels_last:
            torch.nn.Module.to(vae, memory_format=torch.channels_last)
        # diffusers' own `to` warns of an empty list of modules
        return torch.nn.Module.to(vae, self.device, self.weight_dtype)

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        """Loaded when first asked for, as training from cached prompts does without."""
        load = partial(CLIPTextModel.from_pretrained, dtype=torch.float32)
        text_encoder = _load_part(load, self.source, "text_encoder", **self._at)
        return text_encoder.eval().requires_grad_(False).to(self.device, self.weight_dtype)

    @cached_property
    def vae_config(self) -> Any:
        """The VAE's config with its defaults, without the VAE."""
        config = _load_part(AutoencoderKL.load_config, self.source, "vae", revision=self.revision)
        with torch.device("meta"):
            return AutoencoderKL.from_config(config).config

    @property
    def _at(self) -> dict[str, str | None]:
        return {"revision": self.revision, "variant": self.variant}

    @staticmethod
    def load_tokenizer(source: str, revision: str | None) -> CLIPTokenizer:
        """The tokenizer of a checkpoint, a folder or a hub name. Raises InputError if it cannot be loaded."""
        return _load_part(CLIPTokenizer.from_pretrained, source, "tokenizer", revision=revision)

    def digests(self) -> dict[str, str]:
        """SHA-256 of all weights (`weights_digest`), without loading the encoders.

        Raises:
            InputError: an encoder's weights are missing or damaged.
        """
        return {"unet": weights_digest(self.denoiser)} | {p: self._digest(p) for p in ("vae", "text_encoder")}

    def cache_key(self, *parts: str) -> dict[str, str]:
        """Digests of all that decides what frozen parts put out: their weights, configs, and a tokenizer's files."""
        key = {}
        for part in parts:
            files = sorted(path for path in self._folder(part).iterdir() if path.suffix in (".json", ".txt"))
            key |= {f"{part}/{path.name}": file_digest(path) for path in files}
            key |= {part: self._digest(part)} if part != "tokenizer" else {}
        return key

    def _digest(self, part: str) -> str:
        with blame(f"model.pretrained_model_name_or_path: {self.source}: {part}", OSError, SafetensorError):
            return part_digest(self._folder(part), self.variant)

    def _folder(self, part: str) -> Path:
        folder = Path(self.source)
        if not folder.is_dir():  # a hub name, of which all that was loaded lies in one folder of the hub's cache
            folder = Path(hf_hub_download(self.source, "model_index.json", revision=self.revision)).parent
        has_weights = any(path.suffix in (".safetensors", ".bin") for path in (folder / part).glob("*"))
        if part != "tokenizer" and not has_weights:
            getattr(self, part)  # downloads it, or tells that it is not there
        return folder / part

    @property
    def size_multiple(self) -> int:
        """What an image's sides must be multiples of, so that the VAE and the UNet can halve them as often as they
        do."""
        return 2 ** (len(self.vae_config.block_out_channels) + len(self.denoiser.config.block_out_channels) - 2)

    def check_size(self, height: int, width: int, name: str) -> None:
        """Raise InputError, about the field `name`, unless the model can take images of this size."""
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            got = height if height == width else f"{height} x {width}"
            raise InputError(f"{name}: {self.source} needs a multiple of {multiple}, got {got}")

    def move_frozen_parts(self, device: torch.device, weight_dtype: torch.dtype) -> None:
        """Where VAE and text encoder are, and in which type: those that are loaded, and those that will be."""
        self.device, self.weight_dtype = device, weight_dtype
        for part in (self.__dict__.get("vae"), self.__dict__.get("text_encoder")):
            if part is not None:
                torch.nn.Module.to(part, device, weight_dtype)

    def free_cached(self) -> None:
        """Drop the frozen parts `cached` from memory; they are loaded again when they are used again."""
        for part in self.cached:
            self.__dict__.pop(part, None)

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The moments of the VAE's posterior, mean and standard deviation: (batch, 2, channels, H/8, W/8)."""
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1)

    def sample_latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents drawn from the posterior by `noise`, of the latents' shape; float32."""
        mean, std = moments.float().unbind(1)
        return (mean + std * noise) * self.vae_config.scaling_factor

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
        fresh = dataclasses.replace(self, denoiser=denoiser, device="cpu", weight_dtype=torch.float32)
        tokenizer = self.load_tokenizer(self.source, self.revision)
        self._pipeline(denoiser, fresh.vae, fresh.text_encoder, tokenizer).save_pretrained(folder)

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
        culprit = f"model.pretrained_model_name_or_path: {source}"
        raise InputError(f"{culprit}: {name}: {one_line(error)}") from error
