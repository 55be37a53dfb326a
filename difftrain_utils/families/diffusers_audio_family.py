"""What all families of audio models in diffusers' format have in common."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.text_to_audio import TextToAudioConfig
from difftrain_utils.errors import InputError
from difftrain_utils.families.diffusers_family import DiffusersFamily
from difftrain_utils.families.family import Weights
from difftrain_utils.media.audio import Sound

warnings.filterwarnings(
    "ignore", "`torch.nn.utils.weight_norm` is deprecated"
)  # diffusers' autoencoders are made of it


@dataclass
class DiffusersAudioFamily(DiffusersFamily):
    """An `AudioFamily` of checkpoints in diffusers' format: a subclass says what it says of a `DiffusersFamily`, how
    many samples are one of latents (`hop_length`), how long a sound may be (`max_length_in_s`), and how its pipeline is
    told how long one is to be (`length_options`)."""

    content: ClassVar[str] = "waveforms"

    waveform_length: int = 0
    """Samples of all windows."""

    @classmethod
    def load(
        cls, source: str, model_index: dict[str, Any], config: TextToAudioConfig, weights: Weights
    ) -> "DiffusersAudioFamily":
        family = super().load(source, model_index, config, weights)
        family.waveform_length = config.data.waveform_length
        return family

    @classmethod
    def check_scheduler(cls, config: TextToAudioConfig, prediction_type: str, allowed: Mapping[str, str]) -> None:
        """Raise InputError if the config asks for another prediction type, or for what its section `scheduler` has
        beyond the checkpoint's own: `allowed` are the values of its fields that say the same."""
        name = cls.pipeline_class.__name__
        if (got := config.model.prediction_type) not in (None, prediction_type):
            raise InputError(f"model.prediction_type: must be {prediction_type} for a {name}, or null, got {got}")
        for field, value in vars(config.scheduler).items():
            if value not in (None, allowed.get(field)):
                rule = f"must be {allowed[field]}, or null" if field in allowed else "must be null"
                raise InputError(f"scheduler.{field}: {rule} for a {name}, got {value}")

    def _cut_up(self, vae: torch.nn.Module) -> None:
        """See `DiffusersFamily`. Tiles and what they have in common are of whole latents: else those of one would lie
        between the other's."""
        super()._cut_up(vae)
        for name in ("tile_sample_min_length", "tile_sample_overlap") if self.vae_tiling else ():
            setattr(vae, name, self._whole_latents(getattr(vae, name)))

    def _whole_latents(self, length: int) -> int:
        """Of so many samples those that make whole latents."""
        return length // self.hop_length * self.hop_length

    # ── What fits ────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def tile_size(self) -> tuple[int] | None:
        """Samples of the longest tile of `model.vae_tiling`; None of an autoencoder without."""
        length = getattr(self._on_meta("vae"), "tile_sample_min_length", None)
        return None if length is None else (self._whole_latents(length),)

    @property
    def hop_length(self) -> int:
        """How many samples are one of latents."""
        raise NotImplementedError

    @property
    def max_length_in_s(self) -> float:
        """Seconds of the longest sound that the model can be told of."""
        raise NotImplementedError

    @property
    def sampling_rate(self) -> int:
        return self.config_of("vae").sampling_rate

    @property
    def audio_duration(self) -> float:
        """Of a window, in seconds."""
        return self.waveform_length / self.sampling_rate

    @property
    def patch_size(self) -> int:
        return self.config_of(self.denoiser_part).get("patch_size", 1)

    @property
    def size_multiple(self) -> int:
        return self.hop_length * self.patch_size

    def seconds_of(self, waveform_length: int) -> float:
        """How long so many samples are, so that the seconds times the rate, cut to a whole number as pipelines do it,
        are the samples: of one length in fourteen at 44.1 kHz they are one less, unless the seconds are rounded up."""
        seconds = waveform_length / self.sampling_rate
        is_less = int(seconds * self.sampling_rate) < waveform_length
        return math.nextafter(seconds, math.inf) if is_less else seconds

    def check_waveforms(self, data: AudioDataConfig) -> None:
        """See `AudioFamily`."""
        for name in ("sampling_rate", "audio_channels"):
            needed, got = self.config_of("vae")[name], getattr(data, name)
            if got != needed:
                raise InputError(f"data.{name}: {self.name} needs {needed}, got {got}")
        multiple, length = self.size_multiple, data.waveform_length
        if length % multiple:
            below = length // multiple * multiple
            near = f"{below} or {below + multiple}" if below else str(multiple)
            raise InputError(
                f"data.waveform_length: {self.name} needs a multiple of {multiple}, such as {near}, got {length}"
            )
        longest = int(self.max_length_in_s * self.sampling_rate)
        if length > longest:
            raise InputError(f"data.waveform_length: {self.name} takes {longest} at most, got {length}")

    def pad_text(self, values: torch.Tensor) -> torch.Tensor:
        """Of captions' tokens, (batch, tokens, …), with zeros up to `text_length`: caches leave out those that are at
        the end of all captions."""
        return torch.nn.functional.pad(values, (0, 0) * (values.ndim - 2) + (0, self.text_length - values.shape[1]))

    # ── Pipelines ────────────────────────────────────────────────────────────────────────────────────────────
    def length_options(
        self, pipeline: DiffusionPipeline, waveform_length: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Any]:
        """What a call of the pipeline is told so that it makes a sound of this length for each of the generators."""
        raise NotImplementedError

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
        """See `AudioFamily`."""
        pipeline = self.pipeline(denoiser)
        options = self.picture_options(
            pipeline,
            list(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )
        options |= self.length_options(pipeline, waveform_length, generators)
        waveforms = pipeline(**options, generator=list(generators)).audios
        return [Sound(waveform.float().cpu().numpy(), self.sampling_rate) for waveform in waveforms]
