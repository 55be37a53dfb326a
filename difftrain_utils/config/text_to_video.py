"""The config of train_text_to_video.py."""

from dataclasses import dataclass
from typing import ClassVar

from difftrain_utils.config.config import Require
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.video_data import VideoDataConfig


@dataclass
class TextToVideoConfig(TextToImageConfig):
    """One run of `train_text_to_video.py`: of the same sections as images, but for the data."""

    EXAMPLE: ClassVar[str] = "configs/quickstart_video.yaml"

    judges: ClassVar[tuple[str, ...]] = ("moving_shapes",)
    judged_data: ClassVar[str] = "builtin:moving-shapes"

    data: VideoDataConfig

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: larger and longer videos need more noise by the number of their tokens"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        super().check_sections(requires)

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "av"}
