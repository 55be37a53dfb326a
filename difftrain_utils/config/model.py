"""The checkpoint to train."""

from dataclasses import dataclass
from typing import Literal

from difftrain_utils.config.config import Require


@dataclass
class ModelConfig:
    """The checkpoint to train."""

    pretrained_model_name_or_path: str
    """A diffusers checkpoint: a folder, a hub name, or `builtin:tiny-stable-diffusion` (needs no download)."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    variant: str | None = None
    """Variant of the weight files, e.g. `fp16`."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] | None = None
    """What the denoiser predicts; null: what the checkpoint's scheduler says."""
    train_from_scratch: bool = False
    """Start the denoiser from random weights (drawn from `train.seed`) instead of the checkpoint's.
    The builtin has no trained denoiser, so it always does."""
    max_sequence_length: int | None = None
    """Tokens that captions are cut and padded to, where the model leaves it open; null: its pipeline's default."""
    guidance: float | None = None
    """What a guidance-distilled model (Flux.1 dev) is told in training; null: 1, the images as they are."""
    vae_slicing: bool = False
    """Encode and decode one image at a time: less memory, slower."""

    def check(self, require: Require) -> None:
        require(self.pretrained_model_name_or_path != "", "pretrained_model_name_or_path", "must not be empty")
        length, guidance = self.max_sequence_length, self.guidance
        require(length is None or 1 <= length <= 4096, "max_sequence_length", "must be from 1 to 4096, or null")
        require(guidance is None or 0 <= guidance <= 100, "guidance", "must be from 0 to 100, or null")
