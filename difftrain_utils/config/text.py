"""The config of train_text.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from difftrain_utils.config.config import Config, Require
from difftrain_utils.config.fit import check_shared
from difftrain_utils.config.masking import MaskingConfig
from difftrain_utils.config.model import TextModelConfig
from difftrain_utils.config.text_data import TextDataConfig
from difftrain_utils.config.training import DEFAULT_STEPS, EmaConfig, LrSchedulerConfig, OptimizerConfig, TrainConfig


@dataclass
class TextEvaluationConfig:
    """The samples and the bound on the likelihood that show the progress."""

    num_samples: int = 16
    """Texts generated; 0: none."""
    prompts: list[str] = field(default_factory=list)
    """What they begin with, in turn; none: nothing."""
    seed: int = 0
    """Text i is drawn with the same numbers every time."""
    length: int | None = None
    """Tokens of a text, its prompt's among them; null: as of the samples (`data.sequence_length`)."""
    sampler: Literal["ancestral", "confidence"] = "ancestral"
    """Which tokens are drawn first: any, as in training (MDLM), or those that the model is surest of (LLaDA)."""
    num_inference_steps: int = 64
    """Steps from all masked to none."""
    temperature: float = 1.0
    """Of the tokens' distribution; 0: always the likeliest token."""
    block_length: int | None = None
    """Tokens that are drawn before the next ones, from left to right; null: all at a time."""
    batch_size: int = 64
    """Texts evaluated at a time."""
    num_validation_samples: int = 256
    """Fixed (text, mask) pairs of the validation loss."""
    num_validation_bins: int = 8
    """Mask fractions from low to high that the validation loss is reported for."""
    judge: Literal["brackets"] | None = None
    """Count the texts that are words of `builtin:brackets`."""
    perplexity_model: str | None = None
    """A causal language model of transformers (a folder or hub name, such as `gpt2`) to which the samples' perplexity
    is; null: none."""

    def check(self, require: Require) -> None:
        require(self.num_samples >= 0, "num_samples", "must be 0 or more")
        require(self.seed >= 0, "seed", "must be 0 or more")
        for name in ("num_inference_steps", "batch_size", "num_validation_bins"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("length", "block_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1, or null")
        require(self.temperature >= 0, "temperature", "must be 0 or more")
        require(self.perplexity_model != "", "perplexity_model", "must not be empty")
        samples, bins = self.num_validation_samples, self.num_validation_bins
        fits = samples >= bins and samples % bins == 0
        require(fits, "num_validation_samples", f"must be a multiple of num_validation_bins, {bins}")


@dataclass
class TextConfig(Config):
    """One run of `train_text.py`."""

    EXAMPLE: ClassVar[str] = "configs/quickstart_text.yaml"

    model: TextModelConfig
    data: TextDataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluation: TextEvaluationConfig = field(default_factory=TextEvaluationConfig)

    def __post_init__(self) -> None:
        if self.train.max_steps is None and self.data.epochs is None:
            self.train.max_steps = DEFAULT_STEPS

    def check_sections(self, requires: dict[str, Require]) -> None:
        train, evaluation, longest = self.train, self.evaluation, self.data.sequence_length
        requires["train"](train.group_size is None, "group_size", "is of images (noise.pairing)")
        requires["train"](not train.shard_encoders, "shard_encoders", "is of images: there are no text encoders")
        is_even = not self.masking.antithetic or train.batch_size % 2 == 0
        requires["masking"](is_even, "antithetic", f"needs an even train.batch_size (it is {train.batch_size})")
        require, length = requires["evaluation"], evaluation.length or longest
        is_written = evaluation.perplexity_model is None or evaluation.num_samples > 0
        require(is_written, "perplexity_model", "needs evaluation.num_samples above 0")
        require(length <= longest, "length", f"must be at most data.sequence_length, which is {longest}")
        num_blocks = -(-length // (evaluation.block_length or length))
        rule = f"must be at least 1 for each of {num_blocks} blocks of {evaluation.block_length} of {length} tokens"
        require(evaluation.num_inference_steps >= num_blocks, "num_inference_steps", rule)
        check_shared(self, requires)

    @property
    def metrics(self) -> dict[str, tuple[object, str]]:
        """Of each metric by which evaluations may be judged: whether they have it here, and what it needs."""
        evaluation = self.evaluation
        held_out, texts = self.data.validation_split or self.data.validation_dataset, "held-out texts"
        return {
            "validation_loss": (held_out, texts),
            "validation_loss_ema": (held_out and self.ema.enabled, f"{texts} and ema.enabled"),
            "valid": (evaluation.judge and evaluation.num_samples, "evaluation.judge and evaluation.num_samples"),
        }

    def check_split(self, num_processes: int) -> None:
        """Raise InputError unless a batch splits evenly over accumulation steps and processes."""
        self.train.check_split(num_processes)

    def loaded_names(self) -> list[str]:
        """The folders, or names on the hub, of what the config loads."""
        names = [self.model.pretrained_model_name_or_path, self.data.dataset, self.data.validation_dataset]
        names += [source.dataset for source in self.data.sources or []]
        names += [self.evaluation.perplexity_model]
        return [name for name in names if name]

    def needed_packages(self) -> dict[str, str]:
        """The optional packages that the config asks for, by the fields that do."""
        lora = self.model.lora
        fields = {"model.lora": ("peft", lora is not None)}
        fields |= {"model.lora.quantization": ("bitsandbytes", lora is not None and lora.quantization)}
        return {name: package for name, (package, is_used) in fields.items() if is_used}
