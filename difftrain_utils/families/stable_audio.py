"""Stable Audio: a transformer on the latents of an autoencoder for waveforms, told the seconds and a T5's states."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableAudioPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.families.diffusers_audio_family import DiffusersAudioFamily
from difftrain_utils.families.family import Conditioning
from difftrain_utils.objective.schedule import SIGMA_SCHEDULERS, Schedule

LEAST = 1e-6  # of a and s of x_t = a·x_0 + s·ε, where their ratio is told


@dataclass
class StableAudio(DiffusersAudioFamily):
    """See `AudioFamily`; Evans et al. 2024, arXiv:2407.14358. Conditioning: "prompt_embeds", the T5's last states,
    projected, (batch, tokens, width), zeros where there is no token; "prompt_embeds_mask", (batch, tokens); and
    "seconds_embeds", (batch, 2, width), of where in its sound a window begins and how long all of that is; without them
    the window is all.

    The transformer is told no mask: how many zeros there are counts. Of no caption it is told zeros, also for the
    seconds among its tokens, but not for those that it is told besides. The projections, which were trained along with
    the transformer, stay as they are.

    Its sampler's noise levels σ are those of x_0 + σ·ε divided by sqrt(1 + σ²): the path `cosine`, σ = tan φ. What the
    transformer is told of them is that sampler's affair, ln(σ) / 4 or 2 / π · atan(σ)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableAudioPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    guidance_order: ClassVar[str] = "nothing first"

    @classmethod
    def build_schedule(
        cls, sampler_class: type[SchedulerMixin], own: dict[str, Any], config: TextToAudioConfig
    ) -> tuple[Schedule, SchedulerMixin]:
        """The checkpoint's own alone, for what the transformer was trained to be told of the noise is that sampler's.

        Raises:
            ValueError: the checkpoint's sampler is another.
            InputError: the config asks for another.
        """
        name, path, predicted = sampler_class.__name__, "cosine", "v_prediction"
        if not issubclass(sampler_class, SIGMA_SCHEDULERS):
            allowed = ", ".join(each.__name__ for each in SIGMA_SCHEDULERS)
            raise ValueError(f"scheduler: must be one of {allowed}, got {name}")
        for field, needed in {"sigma_data": 1.0, "prediction_type": predicted}.items():
            if own.get(field) != needed:
                raise ValueError(f"scheduler: {field} must be {needed} for a StableAudioPipeline, got {own.get(field)}")
        cls.check_scheduler(config, predicted, {"path": path, "sampler": name})
        return Schedule(path, predicted, own["num_train_timesteps"]), sampler_class.from_config(own)

    # ── What fits ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def hop_length(self) -> int:
        return math.prod(self.config_of("vae").downsampling_ratios)

    @property
    def max_length_in_s(self) -> float:
        return self.config_of("projection_model").max_value

    # ── The parts ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return (*super().frozen_parts, "projection_model")

    def load_denoiser(self) -> torch.nn.Module:
        """See `Family`. What is saved of it samples as many latents as it was trained on."""
        denoiser = super().load_denoiser()
        denoiser.register_to_config(sample_size=self.waveform_length // self.hop_length)
        return denoiser

    def describe_parts(self, *parts: str) -> dict[str, str]:
        """See `Family`. Captions are projected, too."""
        return super().describe_parts(*parts, *(["projection_model"] if "text_encoder" in parts else []))

    # ── Captions and seconds ─────────────────────────────────────────────────────────────────────────────────
    @property
    def text_length(self) -> int:
        return self.part("tokenizer").model_max_length

    def encode_texts(self, texts: list[str]) -> Conditioning:
        parts = {name: self.part(name) for name in (*self.text_parts, "projection_model")}
        embeds = StableAudioPipeline.encode_prompt(SimpleNamespace(**parts), texts, self.device, False)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": embeds.any(-1)}

    def encode_nothing(self) -> Conditioning:
        shape = 1, self.text_length, self.config_of("projection_model").conditioning_dim
        embeds = torch.zeros(shape, device=self.device, dtype=self.weight_dtype)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": embeds.any(-1)}

    @torch.no_grad()
    def embed_seconds(self, seconds_start: torch.Tensor, seconds_total: torch.Tensor) -> torch.Tensor:
        """Where windows begin and how long their sounds are, (batch,) each, as the transformer is told them: (batch, 2,
        width)."""
        told = self.part("projection_model")(start_seconds=seconds_start, end_seconds=seconds_total)
        return torch.cat([told.seconds_start_hidden_states, told.seconds_end_hidden_states], 1)

    def encode(
        self,
        batch: dict[str, Any],
        seed: int,
        text_encoders: torch.nn.Module | None = None,
        purpose: str = "vae_noise",
    ) -> tuple[torch.Tensor, Conditioning]:
        latents, conditioning = super().encode(batch, seed, text_encoders, purpose)
        seconds = self.embed_seconds(batch["seconds_start"], batch["seconds_total"])
        return latents, conditioning | {"seconds_embeds": seconds}

    # ── The transformer ──────────────────────────────────────────────────────────────────────────────────────
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        embeds, seconds = conditioning["prompt_embeds"], conditioning.get("seconds_embeds")
        if seconds is None:
            ends = torch.tensor([0.0, self.audio_duration], device=noisy_latents.device)
            seconds = self.embed_seconds(*ends.expand(len(embeds), 2).unbind(1))
        has_caption = conditioning["prompt_embeds_mask"].any(1)[:, None, None]
        alphas, sigmas = (values.clamp(min=LEAST) for values in self.schedule.alphas_and_sigmas(timesteps))
        rotary = get_1d_rotary_pos_embed(
            self.config_of("transformer").attention_head_dim // 2,
            noisy_latents.shape[2] + 1,
            use_real=True,
            repeat_interleave_real=False,
        )
        return denoiser(
            hidden_states=noisy_latents,
            timestep=self.sampler.precondition_noise(sigmas / alphas),
            encoder_hidden_states=torch.cat([self.pad_text(embeds), seconds * has_caption], 1),
            global_hidden_states=seconds.flatten(1)[:, None],
            rotary_embedding=tuple(part.to(noisy_latents.device) for part in rotary),
            return_dict=False,
        )[0].float()

    def length_options(
        self, pipeline: DiffusionPipeline, waveform_length: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Any]:
        """The pipeline makes as many latents as the denoiser's `sample_size`, and cuts what they are off at the end
        that it is told. From where it begins that must not be more than they are, also where it is rounded up: it
        begins that much later, which is no sample."""
        end = self.seconds_of(waveform_length)
        return {"audio_start_in_s": end - waveform_length / self.sampling_rate, "audio_end_in_s": end}
