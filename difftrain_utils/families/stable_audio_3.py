"""Stable Audio 3: flow matching by a transformer on the latents of an autoencoder for waveforms, told the duration and
the states of a T5Gemma."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin, StableAudio3Pipeline

from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.families.diffusers_audio_family import DiffusersAudioFamily
from difftrain_utils.families.diffusers_family import INNER_FIELDS
from difftrain_utils.families.family import Conditioning
from difftrain_utils.objective.schedule import Schedule

TEXT_LENGTH = 256  # tokens, at which the pipeline cuts captions, whatever the tokenizer takes


@dataclass
class StableAudio3(DiffusersAudioFamily):
    """See `AudioFamily`; arXiv:2605.17991. Conditioning: "prompt_embeds", the T5Gemma's last states, (batch, tokens,
    width), "prompt_embeds_mask", (batch, tokens), of the tokens that are the caption's, and "duration_embeds", (batch,
    width), of how many seconds of sound a window has; without them, of all that a window can have.

    The transformer puts a state that is trained along in the place of tokens that are not the caption's, and looks at
    them all: how many there are counts. It is told the duration twice, as a token after the caption's and beside the
    time, also where it is told no caption, which is the empty one. The weights by which it is told what of a sound is
    given already (`StableAudio3InpaintPipeline`) stay as they are.

    The pipeline says at which noise levels it samples, equally far from each other in the logarithm of their
    signal-to-noise ratio: `scheduler.flow_shift` is that of training alone."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableAudio3Pipeline
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    float32_parts: ClassVar[tuple[str, ...]] = ("duration_embedder",)  # it takes sines of up to 1e4 · 2π
    lora_targets: ClassVar[tuple[str, ...]] = ("to_qkv", "to_q", "to_kv", "to_out")
    guidance_order: ClassVar[str] = "nothing first"
    free_fields: ClassVar[frozenset[str]] = INNER_FIELDS | {
        *("embed_dim", "depth", "num_heads", "ff_mult", "num_memory_tokens"),
        *("use_differential_attention", "timestep_features_dim"),
    }

    @classmethod
    def build_schedule(
        cls, sampler_class: type[SchedulerMixin], own: dict[str, Any], config: TextToAudioConfig
    ) -> tuple[Schedule, SchedulerMixin]:
        """The checkpoint's own alone: it is told the noise levels without a shift that depends on the length, and the
        generators for what it draws between them; and what the transformer is told of the time is what its number of
        timesteps, which is 1, makes of it.

        Raises:
            ValueError: the checkpoint's sampler is another.
            InputError: the config asks for another.
        """
        name, needed = sampler_class.__name__, FlowMatchEulerDiscreteScheduler.__name__
        if name != needed:
            raise ValueError(f"scheduler: must be {needed}, got {name}")
        for field in ("use_dynamic_shifting", "invert_sigmas"):
            if own.get(field):
                raise ValueError(f"scheduler: {field} must be false for a StableAudio3Pipeline, got true")
        allowed = {"path": "linear", "sampler": name, "flow_shift": config.scheduler.flow_shift}
        cls.check_scheduler(config, "flow_prediction", allowed)
        shift = config.scheduler.flow_shift or own["shift"]
        schedule = Schedule("linear", "flow_prediction", own["num_train_timesteps"], shift=shift)
        return schedule, sampler_class.from_config(own)

    # ── What fits ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def hop_length(self) -> int:
        config = self.config_of("vae")
        return config.patch_size * math.prod(config.encoder_strides)

    @property
    def max_length_in_s(self) -> float:
        return self.config_of("duration_embedder").max_val

    @property
    def is_distilled(self) -> bool:
        """The sampler of those that are draws between their few steps, which its pipeline makes unguided."""
        return bool(self.sampler.config.stochastic_sampling)

    # ── The parts ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return (*super().frozen_parts, "duration_embedder")

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. What only the pipeline for inpainting uses is frozen, because DDP waits for the gradient of all
        that is trained."""
        denoiser = super().load_denoiser()
        for block in denoiser.transformer_blocks:
            block.to_local_embed.requires_grad_(False)
        return denoiser

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The autoencoder has no posterior: a standard deviation of 0."""
        vae = self.part("vae")
        latents = vae.encode(pixel_values.to(vae.dtype)).latents
        return torch.stack([latents, torch.zeros_like(latents)], 1)

    # ── Captions and durations ───────────────────────────────────────────────────────────────────────────────
    @property
    def text_length(self) -> int:
        return min(self.part("tokenizer").model_max_length, TEXT_LENGTH)

    def encode_texts(self, texts: list[str]) -> Conditioning:
        parts = {name: self.part(name) for name in self.text_parts}
        embeds, mask = StableAudio3Pipeline.encode_prompt(SimpleNamespace(**parts), texts, self.device, 1)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    @torch.no_grad()
    def embed_duration(self, seconds: torch.Tensor) -> torch.Tensor:
        """Durations, (batch,), as the transformer is told them: (batch, width)."""
        return self.part("duration_embedder")(seconds)

    def encode(
        self,
        batch: dict[str, Any],
        seed: int,
        text_encoders: torch.nn.Module | None = None,
        purpose: str = "vae_noise",
    ) -> tuple[torch.Tensor, Conditioning]:
        """See `Family`. A window lasts as long as all windows, or as its sound if that is shorter: what the pipeline
        would be asked for."""
        latents, conditioning = super().encode(batch, seed, text_encoders, purpose)
        seconds = batch["seconds_total"].clamp(max=self.audio_duration)
        return latents, conditioning | {"duration_embeds": self.embed_duration(seconds)}

    # ── The transformer ──────────────────────────────────────────────────────────────────────────────────────
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"]
        duration = conditioning.get("duration_embeds")
        if duration is None:
            seconds = torch.tensor(self.audio_duration, device=noisy_latents.device)
            duration = self.embed_duration(seconds.expand(len(embeds)))
        embeds, mask = self.pad_text(embeds), self.pad_text(mask)
        context, mask = StableAudio3Pipeline.prepare_cross_attention(None, embeds, mask, duration)
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=context,
            global_hidden_states=duration,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0].float()

    def length_options(
        self, pipeline: DiffusionPipeline, waveform_length: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Any]:
        """With the noise to begin with: of one length in six the seconds times the rate are not quite the samples, of
        which the pipeline would make one latent too many, or leave the last one out."""
        shape = len(generators), self.config_of("vae").latent_dim, waveform_length // self.hop_length
        dtype = pipeline.text_encoder.dtype
        return {
            "duration": self.seconds_of(waveform_length),
            "latents": pipeline.prepare_latents(*shape, dtype, self.device, list(generators)),
        }
