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
    vae_slicing: bool = False
    """Encode and decode one image at a time: less memory, slower."""

    def check(self, require: Require) -> None:
        require(self.pretrained_model_name_or_path != "", "pretrained_model_name_or_path", "must not be empty")
