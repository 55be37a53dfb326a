"""The config of train_text_to_video.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require
from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.video_data import VideoDataConfig


@dataclass
class VideoNoiseConfig(NoiseConfig):
    """The noise that clips are mixed with."""

    frame_correlation: Literal["mixed", "progressive"] | None = None
    """What the noise of a clip's frames (those of its latents) has in common, in training, validation and what
    `evaluation` draws: `mixed`, a part that is the same in all of them; `progressive`, that of a frame goes on from the
    frame before; null: nothing. A pipeline that plain diffusers loads begins with noise of which this is not true,
    unless it is given its `latents`."""
    frame_correlation_strength: float = 1.0
    """α: of the variance, α² / (1 + α²) is in common (PYoCo has 1 for mixed, 2 for progressive)."""

    def check(self, require: Require) -> None:
        super().check(require)
        require(self.frame_correlation_strength > 0, "frame_correlation_strength", "must be above 0")
        is_default = self.frame_correlation_strength == VideoNoiseConfig.frame_correlation_strength
        rule = "goes with noise.frame_correlation"
        require(self.frame_correlation is not None or is_default, "frame_correlation_strength", rule)
        rule = "goes without noise.pyramid_discount, which has its own say in what frames have in common"
        require(self.frame_correlation is None or not self.pyramid_discount, "frame_correlation", rule)


@dataclass
class TextToVideoConfig(TextToImageConfig):
    """One run of `train_text_to_video.py`: of the same sections as images, but for the data and the noise."""

    judges: ClassVar[tuple[str, ...]] = ("moving_shapes",)
    judged_data: ClassVar[str] = "builtin:moving-shapes"

    data: VideoDataConfig
    noise: VideoNoiseConfig = field(default_factory=VideoNoiseConfig)

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: larger and longer videos need more noise by the number of their tokens"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        super().check_sections(requires)

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "av"}
