"""The config of train_text_to_audio.py."""

from dataclasses import dataclass
from typing import ClassVar

from difftrain_utils.config.audio_data import AudioDataConfig
from difftrain_utils.config.config import Require
from difftrain_utils.config.text_to_image import TextToImageConfig


@dataclass
class TextToAudioConfig(TextToImageConfig):
    """One run of `train_text_to_audio.py`: of the same sections as images, but for the data."""

    judges: ClassVar[tuple[str, ...]] = ("tones",)
    judged_data: ClassVar[str] = "builtin:tones"

    data: AudioDataConfig

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: no shift of sounds is by their size"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        for name in ("fid_features", "clip_score_model"):
            requires["evaluation"](getattr(self.evaluation, name) is None, name, "is of images")
        super().check_sections(requires)
        rule = "must be false: the convolutions of sounds have no such layout"
        requires["train"](not self.train.channels_last, "channels_last", rule)

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "soundfile", "data.sampling_rate": "soxr"}
