"""The config of train_text_to_video.py."""

from dataclasses import dataclass, field
from typing import ClassVar

from difftrain_utils.config.config import Require
from difftrain_utils.config.evaluation import EvaluationConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.video_data import VideoDataConfig


@dataclass
class VideoEvaluationConfig(EvaluationConfig):
    """The grid of clips, the validation loss and the metrics that show the progress."""

    networks: ClassVar[tuple[str, ...]] = (*EvaluationConfig.networks, "fvd_features")

    prompts: list[str] = field(default_factory=list)
    """One clip each."""
    batch_size: int = 8
    """Clips generated at a time."""
    num_validation_samples: int = 256
    """Fixed (clip, noise, noise level) triples of the validation loss."""
    shapes_judge: bool = False
    """Count the clips that show what their prompts ask for (for built-in data)."""
    fid_features: str | None = None
    """Network whose features of the clips' middle frames FID and KID compare: an image model of transformers (a folder
    or hub name, such as `facebook/dinov2-base`) or `inception`; null: no FID and KID."""
    clip_score_model: str | None = None
    """CLIP model of the CLIP score, the mean over a clip's frames (a folder or hub name, such as
    `openai/clip-vit-base-patch16`); null: none."""
    fvd_features: str | None = None
    """Network whose features FVD and KVD compare: a video model of transformers (a folder or hub name, such as
    `MCG-NJU/videomae-base`); null: no FVD and KVD."""
    num_metric_images: int = 1000
    """Clips generated for these metrics, from the captions of as many held-out videos."""


@dataclass
class TextToVideoConfig(TextToImageConfig):
    """One run of `train_text_to_video.py`: of the same sections as images, but for the data."""

    judges: ClassVar[tuple[str, ...]] = ("moving_shapes",)
    judged_data: ClassVar[str] = "builtin:moving-shapes"

    data: VideoDataConfig
    evaluation: VideoEvaluationConfig = field(default_factory=VideoEvaluationConfig)

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = "is of images: larger and longer videos need more noise by the number of their tokens"
        requires["scheduler"](self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        super().check_sections(requires)

    @property
    def metrics(self) -> dict[str, tuple[object, str]]:
        needed = self.evaluation.fvd_features, "evaluation.fvd_features"
        return super().metrics | {"fvd": needed, "kvd": needed}

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "av"}
