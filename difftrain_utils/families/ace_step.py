"""ACE-Step: a transformer on the latents of an autoencoder for waveforms, told the states of a Qwen3."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import AceStepPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch.distributed.fsdp import FSDPModule

from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_audio_family import DiffusersAudioFamily
from difftrain_utils.families.family import Conditioning, Weights
from difftrain_utils.media.audio import Sound
from difftrain_utils.objective.schedule import Schedule

SHIFT = 3.0  # of the pipeline's timesteps, which its call has by default, and not the sampler
TEXT_LENGTH = 256  # tokens that its call cuts a caption's text at by default
REFERENCE_SECONDS = 30  # of silence, where there is no sound whose timbre is asked for
UNUSED_PARTS = ("audio_tokenizer", "audio_token_detokenizer")  # of the pipeline's other tasks


@dataclass
class AceStep(DiffusersAudioFamily):
    """See `AudioFamily`; ACE-Step 1.5 (ACE-Step Team 2026, arXiv:2602.00744). Conditioning: "prompt_embeds", the states
    of the lyrics, the timbre and the caption, (batch, tokens, width), and "prompt_embeds_mask", (batch, tokens).

    What the pipeline's call can be told besides a caption and how long a sound is has its default: no lyrics, in
    English, no reference for the timbre, and neither tempo, key nor time signature. How long is said in the caption's
    text, in whole seconds: of a window, those of all windows, wherever in its sound it is.

    The transformer is told no mask, and padding would count: it is asked for captions of each length apart. All tokens
    of no caption are the same, so that one is as good as many.

    The times that the pipeline samples at are shifted by an argument of its call, not by its sampler:
    `scheduler.flow_shift` is that one."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = AceStepPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")

    silence: torch.Tensor | None = None
    """Its latents, (1, length, channels), which come with the condition encoder."""

    @classmethod
    def load(cls, source: str, model_index: dict[str, Any], config: TextToAudioConfig, weights: Weights) -> "AceStep":
        family = super().load(source, model_index, config, weights)
        family.silence = family.part("condition_encoder").silence_latent.clone()
        family.cached += UNUSED_PARTS + (("condition_encoder",) if config.data.cache_text else ())
        family.free_cached()
        return family

    @classmethod
    def build_schedule(
        cls, sampler_class: type[SchedulerMixin], own: dict[str, Any], config: TextToAudioConfig
    ) -> tuple[Schedule, SchedulerMixin]:
        """The checkpoint's own, which takes the pipeline's sigmas, and gives the transformer the times, as they are.

        Raises:
            ValueError: the checkpoint's sampler is another.
            InputError: the config asks for another.
        """
        name, needed = sampler_class.__name__, FlowMatchEulerDiscreteScheduler
        if not issubclass(sampler_class, needed):
            raise ValueError(f"scheduler: must be a {needed.__name__} for an AceStepPipeline, got {name}")
        for field in ("num_train_timesteps", "shift"):
            if own.get(field) != 1:
                raise ValueError(f"scheduler: {field} must be 1 for an AceStepPipeline, got {own.get(field)}")
        allowed = {"path": "linear", "sampler": name, "num_train_timesteps": 1}
        cls.check_scheduler(config, "flow_prediction", allowed | {"flow_shift": config.scheduler.flow_shift})
        shift = config.scheduler.flow_shift or SHIFT
        return Schedule("linear", "flow_prediction", 1, shift=shift), sampler_class.from_config(own)

    @classmethod
    def _check_fields(cls, config: TextToAudioConfig, sampler: SchedulerMixin) -> None:
        super()._check_fields(config, sampler)
        if config.train.compile is not None:
            raise InputError(
                "train.compile: not for an AceStepPipeline, whose transformer would be compiled for captions of each "
                f"length, got {config.train.compile}"
            )

    # ── What fits ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def hop_length(self) -> int:
        return math.prod(self.config_of("vae").downsampling_ratios)

    @property
    def max_length_in_s(self) -> float:
        """As long as the silence that comes with it."""
        silence = self._on_meta("condition_encoder").silence_latent
        return silence.shape[1] * self.hop_length / self.sampling_rate

    @property
    def size_multiple(self) -> int:
        """The transformer fills up what is not a multiple of its patches."""
        return self.hop_length

    @property
    def is_distilled(self) -> bool:
        config = self.config_of("transformer")
        return config.is_turbo or config.model_version == "turbo"

    # ── The parts ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return (*super().frozen_parts, "condition_encoder", *filter(self.has_part, UNUSED_PARTS))

    def of_shapes(self, dtype: torch.dtype, empty: Callable[[torch.nn.Module], torch.nn.Module]) -> "AceStep":
        family = super().of_shapes(dtype, empty)
        family.silence = family.part("condition_encoder").silence_latent
        return family

    def describe_parts(self, *parts: str) -> dict[str, str]:
        """See `Family`. Captions go through the condition encoder, too, and say how long a window is."""
        if "text_encoder" not in parts:
            return super().describe_parts(*parts)
        return super().describe_parts(*parts, "condition_encoder") | {"audio_duration": str(self.audio_duration)}

    # ── Captions ─────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def text_length(self) -> int:
        """Those of no lyrics, one of the timbre, and the most that a caption has."""
        _, lyrics = AceStepPipeline._format_prompt(AceStepPipeline, "")
        return len(self.part("tokenizer")(lyrics).input_ids) + 1 + TEXT_LENGTH

    def encode_texts(self, texts: list[str]) -> Conditioning:
        pipeline = self._pipeline_of((*self.text_parts, "condition_encoder"), None)
        pipeline.tokenizer.padding_side = "right"  # where an encoder that looks back alone does not see it
        states, mask, lyrics, lyrics_mask = pipeline.encode_prompt(
            texts, [""] * len(texts), self.device, audio_duration=self.audio_duration, max_text_length=TEXT_LENGTH
        )
        encoder, number = pipeline.condition_encoder, len(texts)
        frames = math.ceil(REFERENCE_SECONDS * self.sampling_rate / self.hop_length)
        embeds, embeds_mask = encoder(
            text_hidden_states=states,
            text_attention_mask=mask,
            lyric_hidden_states=lyrics,
            lyric_attention_mask=lyrics_mask,
            refer_audio_acoustic_hidden_states_packed=encoder.silence_latent[:, :frames].expand(number, -1, -1),
            refer_audio_order_mask=torch.arange(number, device=self.device),
        )
        embeds = self.pad_text(embeds * embeds_mask[:, :, None])
        return {"prompt_embeds": embeds, "prompt_embeds_mask": self.pad_text(embeds_mask)}

    def encode_nothing(self) -> Conditioning:
        null = self.part("condition_encoder").null_condition_emb
        mask = torch.arange(self.text_length, device=self.device)[None] == 0
        return {"prompt_embeds": self.pad_text(null), "prompt_embeds_mask": mask}

    # ── The transformer ──────────────────────────────────────────────────────────────────────────────────────
    def context_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What the transformer is told of a sound to begin with, where there is none: the latents of silence, and ones,
        for all is to be made; (1, length, 2·channels) for latents (batch, channels, length)."""
        parts = SimpleNamespace(condition_encoder=SimpleNamespace(silence_latent=self.silence))
        silence, _ = AceStepPipeline.prepare_src_latents(
            parts, latents.device, latents.dtype, latent_length=latents.shape[2]
        )
        return torch.cat([silence, torch.ones_like(silence)], -1)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """See `Family`. A denoiser whose weights are shared out is asked for each sample apart, for all processes have
        to ask it equally often."""
        embeds, lengths = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"].sum(1).tolist()
        is_shared, alike = isinstance(denoiser, FSDPModule), {}
        for row, length in enumerate(lengths):
            alike.setdefault(row if is_shared else length, []).append(row)
        context, outputs = self.context_latents(noisy_latents), []
        for rows in alike.values():
            output = denoiser(
                hidden_states=noisy_latents[rows].transpose(1, 2),
                timestep=timesteps[rows],
                timestep_r=timesteps[rows],
                encoder_hidden_states=embeds[rows, : lengths[rows[0]]],
                context_latents=context.expand(len(rows), -1, -1),
                return_dict=False,
            )[0]
            outputs.append(output.transpose(1, 2).float())
        order = [row for rows in alike.values() for row in rows]
        return torch.cat(outputs)[[order.index(row) for row in range(len(order))]]

    def length_options(
        self, pipeline: DiffusionPipeline, waveform_length: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Any]:
        """With the shift that training has, and the noise to begin with: of one length in sixteen the seconds times the
        latents a second are not quite the latents, of which the pipeline would make one too many, or fail."""
        seconds, length = waveform_length / self.sampling_rate, waveform_length // self.hop_length
        if math.ceil(seconds * pipeline.latents_per_second) > length:
            seconds = math.nextafter(seconds, 0)
        dtype, surely = pipeline.transformer.dtype, (length - 0.5) / pipeline.latents_per_second
        latents = pipeline.prepare_latents(len(generators), surely, dtype, self.device, list(generators))
        shift = self.schedule.shift if self.schedule else SHIFT
        return {"audio_duration": seconds, "shift": shift, "latents": latents}

    def generate(
        self,
        denoiser: torch.nn.Module,
        prompts: Sequence[str],
        waveform_length: int,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        generators: Sequence[torch.Generator],
    ) -> list[Sound]:
        """See `AudioFamily`. Each prompt by itself: the pipeline pads them, and takes lists of them with lists of
        lyrics alone."""
        sounds, more = [], (waveform_length, num_inference_steps, guidance_scale, guidance_rescale)
        for prompt, generator in zip(prompts, generators, strict=True):
            sounds += super().generate(denoiser, [prompt], *more, [generator])
        return sounds
