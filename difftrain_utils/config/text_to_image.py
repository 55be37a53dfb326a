"""The config of train_text_to_image.py."""

from dataclasses import dataclass, field
from typing import ClassVar

from difftrain_utils.config.config import Config, Require
from difftrain_utils.config.data import DataConfig
from difftrain_utils.config.evaluation import ImageEvaluationConfig
from difftrain_utils.config.fit import check_shared
from difftrain_utils.config.model import ModelConfig
from difftrain_utils.config.objective import LossConfig, NoiseConfig, SchedulerConfig, StrategyConfig, TimestepsConfig
from difftrain_utils.config.training import DEFAULT_STEPS, EmaConfig, LrSchedulerConfig, OptimizerConfig, TrainConfig


@dataclass
class TextToImageConfig(Config):
    """One run of `train_text_to_image.py`."""

    judges: ClassVar[tuple[str, ...]] = ("shapes", "scenes")
    """Those of the built-in data sets that there are."""
    judged_data: ClassVar[str] = "builtin:shapes, builtin:placed-shapes, builtin:shape-pairs or builtin:scenes"

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluation: ImageEvaluationConfig = field(default_factory=ImageEvaluationConfig)

    def __post_init__(self) -> None:
        if self.train.max_steps is None and self.data.epochs is None:
            self.train.max_steps = DEFAULT_STEPS

    def check_sections(self, requires: dict[str, Require]) -> None:
        data, require = self.data, requires["evaluation"]
        are_builtin = all(str(name).startswith("builtin:") for name in self.datasets)
        rule = f"needs data.dataset {self.judged_data} (it is {', '.join(map(repr, self.datasets))})"
        require(not self.evaluation.shapes_judge or are_builtin, "shapes_judge", rule)
        has_prompts = bool(self.evaluation.prompts)
        require(not self.evaluation.shapes_judge or has_prompts, "shapes_judge", "needs evaluation.prompts")
        held_out = bool(data.validation_split or data.validation_dataset)
        for name in self.evaluation.networks:
            rule = "needs held-out data: data.validation_split or data.validation_dataset"
            require(getattr(self.evaluation, name) is None or held_out, name, rule)
        rule = "needs data.cache_text, or each step would read all of them"
        requires["model"](not self.model.offload_text_encoders or data.cache_text, "offload_text_encoders", rule)
        if self.train.shard == "full":
            rule = "not with model.train_text_encoder; there is DDP for it, train.shard none"
            requires["train"](not self.model.train_text_encoder, "shard", rule)
        rule = "goes without data.cache_text, with which there are no encoders to share out"
        requires["train"](not (self.train.shard_encoders and data.cache_text), "shard_encoders", rule)
        rule = "goes with noise.pairing nearest and transport, and with loss.contrastive"
        requires["train"](self.train.group_size is None or self.has_groups, "group_size", rule)
        rule = "needs captions, which data.caption_dropout 1.0 leaves out"
        requires["loss"](not self.loss.contrastive or data.has_captions, "contrastive", rule)
        has_others = min(self.train.group_size or self.train.batch_size, self.train.batch_size) > 1
        rule = "needs others: train.group_size, or else train.batch_size, must be at least 2"
        requires["loss"](not self.loss.contrastive or has_others, "contrastive", rule)
        requires["noise"](not self.noise.pairs_samples or has_others, "pairing", rule)
        rule = "cannot be with model.train_text_encoder: difftrain posthoc-ema makes averages of whole denoisers"
        both = self.model.train_text_encoder and self.ema.power_sigma_rels
        requires["ema"](not both, "power_sigma_rels", rule)
        if self.model.train_text_encoder:
            requires["data"](not data.cache_text, "cache_text", "cannot be with model.train_text_encoder")
        check_shared(self, requires)

    @property
    def metrics(self) -> dict[str, tuple[object, str]]:
        """Of each metric by which evaluations may be judged: whether they have it here, and what it needs."""
        evaluation, images = self.evaluation, "data.validation_split or data.validation_dataset"
        held_out = self.data.validation_split or self.data.validation_dataset
        judged, judge = evaluation.shapes_judge and evaluation.prompts, "evaluation.shapes_judge and evaluation.prompts"
        return {
            "validation_loss": (held_out, images),
            "validation_loss_ema": (held_out and self.ema.enabled, f"{images}, and ema.enabled"),
            **{
                metric: (getattr(evaluation, name), f"evaluation.{name}")
                for name, of_network in evaluation.networks.items()
                for metric in of_network
            },
            **{
                f"{name}_right": (judged and self.judge == name, f"{judge}, of {name.replace('_', ' ')}")
                for name in self.judges
            },
        }

    @property
    def judge(self) -> str:
        """The built-in data whose judge `evaluation.shapes_judge` asks."""
        return "scenes" if "builtin:scenes" in self.datasets else "shapes"

    @property
    def has_groups(self) -> bool:
        """Whether something works on the samples of a group together."""
        return self.noise.pairs_samples or self.loss.contrastive > 0

    @property
    def datasets(self) -> list[str]:
        """The data sets that are trained on."""
        sources = self.data.sources
        return [self.data.dataset] if sources is None else [source.dataset for source in sources]

    def check_split(self, num_processes: int) -> None:
        """Raise InputError unless a batch splits evenly over accumulation steps and processes, no group of samples cut
        apart."""
        self.train.check_split(num_processes)
        if self.has_groups:
            self.train.check_groups(num_processes)

    def loaded_names(self) -> list[str]:
        """The folders, or names on the hub, of what the config loads."""
        data, evaluation = self.data, self.evaluation
        names = [self.model.pretrained_model_name_or_path, data.dataset, data.validation_dataset]
        names += [source.dataset for source in data.sources or []]
        names += [getattr(evaluation, name) for name in (*evaluation.networks, "autoguidance")]
        return [name for name in names if name and name != "inception"]

    def needed_packages(self) -> dict[str, str]:
        """The optional packages that the config asks for, by the fields that do."""
        lora, fields = self.model.lora, {"noise.pairing": ("scipy", self.noise.pairs_samples)}
        fields |= {"model.lora": ("peft", lora is not None)}
        fields |= {"model.lora.quantization": ("bitsandbytes", lora is not None and lora.quantization)}
        is_inception = getattr(self.evaluation, "fid_features", None) == "inception"  # sounds have none
        fields |= {"evaluation.fid_features": ("torchmetrics", is_inception)}
        return {name: package for name, (package, is_used) in fields.items() if is_used}
