"""The config of train_text_to_video.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require, require_of
from difftrain_utils.config.evaluation import ImageEvaluationConfig
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.objective import NoiseConfig
from difftrain_utils.config.text_to_image import TextToImageConfig
from difftrain_utils.config.video_data import VideoDataConfig


@dataclass
class VideoModelConfig(ModelConfig):
    """The checkpoint to train."""

    pretrained_model_name_or_path: str
    """A diffusers checkpoint: a folder, a hub name, or a built-in one such as `builtin:tiny-wan` (needs no download;
    docs/video.md lists them)."""
    first_frame_probability: float = 0.0
    """Share of the samples of which the model is given the first frame, where it does with it and without (LTX-Video,
    Wan 2.2 TI2V); models that are given each, by channels of their own (`WanImageToVideoPipeline`), leave it 0."""

    def check(self, require: Require) -> None:
        super().check(require)
        require(0 <= self.first_frame_probability <= 1, "first_frame_probability", "must be between 0 and 1")


@dataclass
class VideoEvaluationConfig(ImageEvaluationConfig):
    """The grid of clips, the validation loss and the metrics that show the progress."""

    networks: ClassVar[dict[str, tuple[str, ...]]] = ImageEvaluationConfig.networks | {"fvd_features": ("fvd", "kvd")}

    prompts: list[str] = field(default_factory=list)
    """One clip each."""
    first_frames: list[str] = field(default_factory=list)
    """Image files with which the clips of `prompts` begin, one each, cropped as the data is; none: a clip is made of
    its prompt alone, which models of images to videos cannot."""
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

    def check(self, require: Require) -> None:
        super().check(require)
        rule = f"must be one for each of evaluation.prompts, {len(self.prompts)}, or none"
        require(len(self.first_frames) in (0, len(self.prompts)), "first_frames", rule)


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

    EXAMPLE: ClassVar[str] = "configs/quickstart_video.yaml"

    judges: ClassVar[tuple[str, ...]] = ("moving_shapes",)
    judged_data: ClassVar[str] = "builtin:moving-shapes"

    model: VideoModelConfig
    data: VideoDataConfig
    noise: VideoNoiseConfig = field(default_factory=VideoNoiseConfig)
    evaluation: VideoEvaluationConfig = field(default_factory=VideoEvaluationConfig)

    def check(self) -> None:
        rule = "is of images: larger and longer videos need more noise by the number of their tokens"
        require = require_of(self.scheduler, "scheduler")  # first of all: what goes with it does not matter here
        require(self.scheduler.flow_base_resolution is None, "flow_base_resolution", rule)
        super().check()

    def check_sections(self, requires: dict[str, Require]) -> None:
        rule = f"mirrors what moves left, and {self.judged_data} tells left from right"
        requires["data"](not (self.data.random_flip and self.judged_data in self.datasets), "random_flip", rule)
        rule = "needs clips of several frames, and here all are of one (data.num_frames, or data.buckets)"
        for section, name in (("noise", "frame_correlation"), ("model", "first_frame_probability")):
            requires[section](not (self.data.are_stills and getattr(getattr(self, section), name)), name, rule)
        super().check_sections(requires)

    @property
    def judge(self) -> str:
        return self.judges[0]

    def needed_packages(self) -> dict[str, str]:
        return super().needed_packages() | {"data": "av"}
