"""The pictures and figures that show the progress."""

from dataclasses import dataclass, field
from typing import ClassVar

from difftrain_utils.config.config import Require
from difftrain_utils.errors import InputError

MAX_PROMPTS, MAX_LENGTH = 1000, 2000  # one image each, every time


@dataclass
class EvaluationConfig:
    """The grid, the validation loss and the metrics that show the progress, of any medium."""

    networks: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The fields that name one, with its metrics, which need held-out rows."""

    prompts: list[str] = field(default_factory=list)
    """One image each."""
    seed: int = 0
    """Prompt i starts from the same noise every time."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1: none."""
    guidance_rescale: float = 0.0
    """How far guided predictions are scaled back to the spread of unguided ones (0.7 is usual with
    `scheduler.rescale_betas_zero_snr`); 0: not."""
    guidance_interval: list[float] | None = None
    """[start, stop]: guide only at these noise levels, shares of noise s / (a + s) of x_t = a·x_0 + s·ε from 0 to 1
    (of flow matching its time); null: at all."""
    autoguidance: str | None = None
    """Guide by a weaker model instead of by no prompt, so far as `guidance_scale` says (2 is usual): a pipeline (folder
    or hub name) of the same family, a run, a checkpoint, or a file of `train.save_weights_every`."""
    batch_size: int = 8
    """Images generated at a time."""
    num_validation_samples: int = 256
    """Fixed (image, noise, noise level) triples of the validation loss."""
    num_validation_bins: int = 8
    """Noise levels from low to high that the validation loss is reported for."""
    shapes_judge: bool = False
    """Count the images that show what their prompts ask for (for built-in data)."""
    num_metric_images: int = 1000
    """Images generated for these metrics, from the captions of as many held-out images."""

    @property
    def makes_images(self) -> bool:
        """Whether anything is generated."""
        return bool(self.prompts or any(getattr(self, name) for name in self.networks))

    def check(self, require: Require) -> None:
        rule = f"at most {MAX_PROMPTS} of at most {MAX_LENGTH} characters (in difftrain_utils/config/evaluation.py)"
        if len(self.prompts) > MAX_PROMPTS or max(map(len, self.prompts), default=0) > MAX_LENGTH:
            lengths = f"{len(self.prompts)}, the longest of {max(map(len, self.prompts))}"
            raise InputError(f"evaluation.prompts: {rule}, got {lengths}")
        require(self.num_inference_steps >= 1, "num_inference_steps", "must be at least 1")
        require(self.guidance_scale >= 1, "guidance_scale", "must be at least 1")
        require(0 <= self.guidance_rescale <= 1, "guidance_rescale", "must be between 0 and 1")
        interval, is_guided = self.guidance_interval, self.guidance_scale > 1
        fits = interval is None or (len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1)
        require(fits, "guidance_interval", "must be [start, stop] with 0 <= start < stop <= 1, or null")
        for name in ("guidance_interval", "autoguidance"):
            rule = f"needs a guidance_scale above 1, which is {self.guidance_scale:g}"
            require(getattr(self, name) is None or is_guided, name, rule)
        require(self.autoguidance != "", "autoguidance", "must not be empty")
        rule = "cannot go with autoguidance, which takes the place of the guidance that is rescaled"
        require(not (self.autoguidance and self.guidance_rescale), "guidance_rescale", rule)
        require(self.batch_size >= 1, "batch_size", "must be at least 1")
        samples, bins = self.num_validation_samples, self.num_validation_bins
        require(bins >= 1, "num_validation_bins", "must be at least 1")
        fits = samples >= bins and samples % bins == 0
        require(fits, "num_validation_samples", f"must be a multiple of num_validation_bins, {bins}")
        require(self.seed >= 0, "seed", "must be 0 or more")
        for name in self.networks:
            require(getattr(self, name) != "", name, "must not be empty")
        require(self.num_metric_images >= 2, "num_metric_images", "must be at least 2")


@dataclass
class ImageEvaluationConfig(EvaluationConfig):
    """The grid of images, the validation loss and the image metrics that show the progress."""

    networks: ClassVar[dict[str, tuple[str, ...]]] = {
        "fid_features": ("fid", "kid"),
        "clip_score_model": ("clip_score",),
    }

    fid_features: str | None = None
    """Network whose features FID and KID compare: an image model of transformers (a folder or hub name, such as
    `facebook/dinov2-base`) or `inception`; null: no FID and KID."""
    clip_score_model: str | None = None
    """CLIP model of the CLIP score (a folder or hub name, such as `openai/clip-vit-base-patch16`); null: none."""
