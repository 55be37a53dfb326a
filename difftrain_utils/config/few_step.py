"""The config of train_few_step.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require
from difftrain_utils.config.evaluation import ImageEvaluationConfig
from difftrain_utils.config.text_to_image import TextToImageConfig

METHODS_OF_FIELDS = {
    "flow_share": ("mean_flow", "shortcut"),
    "adaptive_power": ("mean_flow",),
    "guidance": ("mean_flow", "shortcut"),
    "guidance_mix": ("mean_flow",),
    "num_steps": ("shortcut",),
    "warmup_steps": ("consistency",),
}


@dataclass
class FewStepMethodConfig:
    """How a model learns to sample in few steps."""

    method: Literal["mean_flow", "shortcut", "consistency"] = "mean_flow"
    """MeanFlow, shortcut models, both on the linear path, or continuous-time consistency (sCM) on the cosine path."""
    flow_share: float = 0.75
    """The share of samples that learn the velocity, as in flow matching, while the others learn steps; not of
    `consistency`."""
    adaptive_power: float = 1.0
    """p of `mean_flow`: a sample's squared error is divided by itself to the power of p; 0: not."""
    guidance: float = 1.0
    """Classifier-free guidance that is trained in, and costs nothing in sampling; 1: none. ω of `mean_flow`; of
    `shortcut` that of the shortest steps, from which the longer ones learn it; not of `consistency`."""
    guidance_mix: float = 0.0
    """κ of `mean_flow`: how much of that guidance's velocity is the model's own, which makes the whole of it
    ω / (1 - κ)."""
    num_steps: int = 128
    """Steps of the finest sampling of `shortcut`, a power of 2."""
    warmup_steps: int = 1000
    """Steps over which the derivative of the model comes into the target of `consistency`."""

    def check(self, require: Require) -> None:
        require(0 <= self.flow_share <= 1, "flow_share", "must be between 0 and 1")
        require(0 <= self.adaptive_power <= 2, "adaptive_power", "must be between 0 and 2")
        require(self.guidance >= 1, "guidance", "must be at least 1")
        require(0 <= self.guidance_mix < 1, "guidance_mix", "must be at least 0 and below 1")
        is_power = self.num_steps >= 2 and self.num_steps.bit_count() == 1
        require(is_power and self.num_steps <= 2**20, "num_steps", "must be a power of 2, from 2 to 2^20")
        require(self.warmup_steps >= 0, "warmup_steps", "must be 0 or more")
        for name, methods in METHODS_OF_FIELDS.items():
            is_default = getattr(self, name) == getattr(FewStepMethodConfig, name)
            rule = f"goes with few_step.method {' or '.join(methods)}"
            require(self.method in methods or is_default, name, rule)
        rule = "goes with few_step.guidance above 1"
        require(self.guidance > 1 or self.guidance_mix == 0, "guidance_mix", rule)


@dataclass
class FewStepEvaluationConfig(ImageEvaluationConfig):
    """The grid of images, the validation loss and the image metrics that show the progress."""

    num_inference_steps: int = 1
    """Denoising steps: few."""
    guidance_scale: float = 1.0
    """Must be 1: what guidance there is, is trained in (`few_step.guidance`)."""

    def check(self, require: Require) -> None:
        require(self.guidance_scale == 1, "guidance_scale", "must be 1; few_step.guidance trains guidance in")
        rule = "not here: there is no guidance at sampling; few_step.guidance trains it in"
        require(self.guidance_rescale == 0, "guidance_rescale", rule)
        require(self.guidance_interval is None, "guidance_interval", rule)
        require(self.autoguidance is None, "autoguidance", rule)
        super().check(require)


def pipeline_guidance(method: str, pipeline_class: str | None, num_inference_steps: int) -> float:
    """The `guidance_scale` with which a plain pipeline samples what was trained by a method: of those that tell the
    denoiser how far a step goes it says that, and is no guidance."""
    if method == "consistency":
        return 1.0
    return (0 if pipeline_class == "FluxPipeline" else 1) + 1 / num_inference_steps


@dataclass
class FewStepConfig(TextToImageConfig):
    """One run of `train_few_step.py`."""

    EXAMPLE: ClassVar[str] = "configs/quickstart_few_step.yaml"

    few_step: FewStepMethodConfig = field(default_factory=FewStepMethodConfig)
    evaluation: FewStepEvaluationConfig = field(default_factory=FewStepEvaluationConfig)

    @property
    def tells_gap(self) -> bool:
        return self.few_step.method != "consistency"

    def check_sections(self, requires: dict[str, Require]) -> None:
        super().check_sections(requires)
        method, prediction_type = self.few_step.method, self.model.prediction_type
        needed = "flow_prediction" if self.tells_gap else "v_prediction"
        rule = f"must be {needed} for few_step.method {method}"
        requires["model"](prediction_type in (needed, None), "prediction_type", rule)
        rule = "is of train_text_to_image.py"
        requires["strategy"](not self.strategy.dream_training, "dream_training", rule)
        requires["loss"](self.loss.contrastive == 0, "contrastive", rule)
        requires["noise"](not self.noise.input_perturbation, "input_perturbation", rule)
        rule = "not here: the derivative of the model is taken of whole weights; there is DDP for it, train.shard none"
        requires["train"](self.train.shard != "full", "shard", rule)
        rule = f"not with few_step.method {method}: torch has no forward derivative of it while FLOPs are counted"
        requires["train"](method == "shortcut" or not self.train.plain_attention, "plain_attention", rule)
        is_plain = method != "mean_flow" or self.few_step.adaptive_power == 0
        rule = "with few_step.method mean_flow needs few_step.adaptive_power 0: other powers divide by the loss"
        requires["loss"](is_plain or not self.loss.learned_uncertainty, "learned_uncertainty", rule)
        requires["loss"](is_plain or self.loss.weighting == "uniform", "weighting", rule)
        requires["loss"](is_plain or self.loss.type == "mse", "type", rule)
        if method == "shortcut":
            rule = "not with few_step.method shortcut, whose steps go from noise to data"
            requires["timesteps"](self.timesteps.min == 0, "min", rule)
            requires["timesteps"](self.timesteps.max == 1, "max", rule)
            steps, finest = self.evaluation.num_inference_steps, self.few_step.num_steps // 2
            rule = (
                f"must be a power of 2 up to {finest}, half of few_step.num_steps: of others the model learns no steps"
            )
            is_learned = steps <= finest and steps.bit_count() == 1
            requires["evaluation"](is_learned, "num_inference_steps", rule)
        rule = "needs model.trainable, with what tells the denoiser of its steps, and model.lora.merge"
        is_told = not self.tells_gap or self.model.lora is None or self.model.trainable is not None
        requires["model"](is_told, "lora", rule)
        guided = self.few_step.guidance == 1 or self.data.caption_dropout > 0
        rule = "needs data.caption_dropout above 0, or the model does not learn what is without a caption"
        requires["few_step"](guided, "guidance", rule)
        rule = "not with model.train_text_encoder, for what is without a caption is encoded once"
        encodes_once = self.few_step.guidance == 1 or not self.model.train_text_encoder
        requires["few_step"](encodes_once, "guidance", rule)
