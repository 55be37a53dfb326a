"""The config of train_text_to_audio.py."""

from dataclasses import dataclass, field
from typing import ClassVar

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import Require
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.text_to_image import TextToImageConfig


@dataclass
class AudioEvaluationConfig(EvaluationConfig):
    """The sounds with their spectrograms, the validation loss and the metrics that show the progress."""

    networks: ClassVar[dict[str, tuple[str, ...]]] = {
        "fad_features": ("fad", "kad"),
        "clap_score_model": ("clap_score",),
    }

    prompts: list[str] = field(default_factory=list)
    """One sound each."""
    batch_size: int = 8
    """Sounds generated at a time."""
    num_validation_samples: int = 256
    """Fixed (sound, noise, noise level) triples of the validation loss."""
    shapes_judge: bool = False
    """Count the sounds that are what their prompts ask for (for built-in data)."""
    num_metric_images: int = 1000
    """Sounds generated for the metrics of networks, from the captions of as many held-out sounds."""
    fad_features: str | None = None
    """Network whose features FAD and KAD compare: an audio model of transformers (a folder or hub name, such as
    `laion/clap-htsat-unfused`); null: no FAD and KAD."""
    clap_score_model: str | None = None
    """CLAP model of the CLAP score (a folder or hub name, such as `laion/clap-htsat-unfused`); null: none."""


@dataclass
class TextToAudioConfig(TextToImageConfig):
    """One run of `train_text_to_audio.py`: of the same sections as images, but for the data and the
    evaluation."""

    EXAMPLE: ClassVar[str] = "configs/quickstart_audio.yaml"

    judges: ClassVar[tuple[str, ...]] = ("tones",)
    judged_data: ClassVar[str] = "builtin:tones"

    data: AudioDataConfig
    evaluation: AudioEvaluationConfig = field(default_factory=AudioEvaluationConfig)

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: no shift of sounds is by their size"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        rule = "must be false: the convolutions of sounds have no such layout"
        requires["train"](not self.train.channels_last, "channels_last", rule)
        super().check_sections(requires)

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "soundfile", "data.sampling_rate": "soxr"}
