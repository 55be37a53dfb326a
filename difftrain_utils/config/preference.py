"""The config of train_preference.py."""

from dataclasses import dataclass, field
from typing import ClassVar

from difftrain_utils.config.config import Require
from difftrain_utils.config.pairs import PairDataConfig
from difftrain_utils.config.text_to_image import TextToImageConfig


@dataclass
class PreferenceLossConfig:
    """How a model learns what is preferred."""

    beta: float = 5000.0
    """How little the model may depart from what it was before training: of Diffusion-DPO's β, with the number of
    timesteps in it, as the paper's code has it. Larger: less."""

    def check(self, require: Require) -> None:
        require(self.beta > 0, "beta", "must be above 0")


@dataclass
class PreferenceConfig(TextToImageConfig):
    """One run of `train_preference.py`."""

    EXAMPLE: ClassVar[str] = "configs/quickstart_preference.yaml"

    data: PairDataConfig
    preference: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)

    def check_sections(self, requires: dict[str, Require]) -> None:
        encoders = "the model before training, which the loss compares with, has them as they were"
        requires["model"](not self.model.train_text_encoder, "train_text_encoder", f"not for pairs: {encoders}")
        both = self.model.trainable is not None and self.model.lora is not None
        requires["model"](not both, "trainable", "not for pairs with model.lora: give one of the two")
        for section, name, rule in (
            ("strategy", "dream_training", "its noise would differ between the two images of a pair"),
            ("noise", "pairing", "its noise would be near one of the two images of a pair"),
            ("loss", "contrastive", "the images that are pushed away are the rejected ones"),
            ("loss", "learned_uncertainty", "a preference's loss does not depend on the noise level so"),
        ):
            requires[section](not getattr(getattr(self, section), name), name, f"not for pairs: {rule}")
        rule = "must be mse for pairs: that is the logarithm of a Gaussian's density, which the loss compares"
        requires["loss"](self.loss.type == "mse", "type", rule)
        requires["evaluation"](self.evaluation.fid_features is None, "fid_features", "not for pairs")
        super().check_sections(requires)

    @property
    def metrics(self) -> dict[str, tuple[object, str]]:
        known = super().metrics
        accuracies = {f"validation_implicit_accuracy{ema}": known[f"validation_loss{ema}"] for ema in ("", "_ema")}
        return known | accuracies | {"shapes_preferred": known["shapes_right"]}
