"""The config of a text-to-video run."""

from dataclasses import dataclass

from difftrain_utils.config.config import Require
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.video_data import VideoDataConfig


@dataclass
class TextToVideoConfig(TextToImageConfig):
    """One text-to-video run: of the same sections as images, but for the data."""

    data: VideoDataConfig

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: larger and longer videos need more noise by the number of their tokens"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        super().check_sections(requires)

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "av"}
