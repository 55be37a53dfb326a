"""The configuration of a run: its fields, their meaning, and what they may be.

A run's config is a YAML file (`--config FILE`); any field is overridden on the command line by its
dotted name (`--train.max_steps 200`). Nothing here imports torch, so a typo is told at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from difftrain_utils.errors import InputError

MIXED_PRECISION = {None: None, "fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # train.precision as accelerate says it
ALIASES = {"--output-dir": "--train.output_dir", "--resume-from": "--train.resume_from"}


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


@dataclass
class SourceConfig:
    """One of several data sets, an item of `data.sources`."""

    dataset: str
    """As data.dataset."""
    split: str = "train"
    """As data.split."""
    image_column: str = "image"
    """As data.image_column."""
    caption_column: str | list[str] = "text"
    """As data.caption_column."""
    weight: float | None = None
    """Share of the samples that are of this source."""


@dataclass
class DataConfig:
    """Images and captions, and how an image becomes a training sample."""

    dataset: str | None = None
    """A folder of images with a `metadata.jsonl`, of parquet, arrow or WebDataset tar files, a hub data set, or
    `builtin:shapes` (needs no download)."""
    split: str = "train"
    """The split of the data set to train on."""
    streaming: bool = False
    """Read the data set as a stream, for one that does not fit on the disk (also from a folder of tar files)."""
    shuffle_buffer: int = 1000
    """Rows of a stream that are shuffled among each other; each worker and each process keeps as many in memory."""
    image_column: str = "image"
    """Column of the images (an image folder calls it `image`, tar files `jpg`, `png`, …)."""
    caption_column: str | list[str] = "text"
    """Column of the captions: a string, or a list of strings of which one is drawn. `json.caption` is the field caption
    of a column json. A list of columns: of all their captions that are not null one is drawn."""
    sources: list[SourceConfig] | None = None
    """Several data sets instead of `dataset`: a list of {dataset: …, split: train, image_column: image, caption_column:
    text, weight: null}, each as the field of data of that name. `weight` is a source's share of the samples (for all
    sources or none; they are scaled to add up to 1); without weights every row comes once an epoch."""
    resolution: int = 512
    """Side of the square training image in pixels; the image's shorter side is resized to it."""
    center_crop: bool = False
    """Crop the centre instead of a random place."""
    random_flip: bool = False
    """Mirror half of the samples."""
    image_interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Pillow's filter for resizing."""
    caption_dropout: float = 0.0
    """Probability of an empty caption, for classifier-free guidance (0.1 is usual)."""
    validation_split: float = 0.0
    """Share of the images to hold out for the validation loss, chosen by their file names."""
    validation_dir: str | None = None
    """Another data set for the validation loss, instead of a share of this one. It is read with `split`, `image_column`
    and `caption_column`, too, also where there are `sources`."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do about a row whose image or caption cannot be read: stop, or take another row in its place and count it
    (`skipped_rows` in metrics.jsonl)."""
    buckets: Literal["auto"] | list[list[int]] | None = None
    """Sizes [height, width] to train at, of which each image gets that of the nearest aspect ratio; `auto`: sizes of
    about resolution² pixels; null: squares only. Each batch has one size."""
    cache_latents: bool = False
    """Run the VAE on each image once, before training, and keep its moments on the disk (needs center_crop)."""
    cache_text: bool = False
    """Run the text encoder on each caption once, before training, and keep its output on the disk."""
    cache_dir: str | None = None
    """Folder of these caches, and of other things that were computed about the data; null: `difftrain` in the cache of
    datasets."""
    num_workers: int = 0
    """Processes that load images, for each training process; 0: the training process does it."""


@dataclass
class TrainConfig:
    """The run."""

    output_dir: str = "runs/text-to-image"
    """Folder for all that the run leaves (short form: --output-dir)."""
    resume_from: str | None = None
    """`latest` or a checkpoint folder to go on from (short form: --resume-from). `latest` starts from the
    beginning where there is no checkpoint yet, so one command serves for start and restart."""
    overwrite: bool = False
    """Delete the run that `output_dir` holds and start afresh."""
    seed: int = 0
    """Everything random about a run is a function of this and of the number of the sample."""
    max_steps: int = 1000
    """Optimizer steps."""
    max_hours: float | None = None
    """Save and stop after this time, to be resumed; null: no limit."""
    batch_size: int = 16
    """Samples of one optimizer step, over all processes and accumulation steps."""
    num_processes: int | None = None
    """Refuse to start with another number of processes; null: with any."""
    gradient_accumulation_steps: int = 1
    """Parts that a batch is split into to save memory; the losses stay the same."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; null: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the gradient is infinite or NaN: save what was before and stop, or leave the step's update out."""
    max_skipped_steps: int = 10
    """Updates left out by `skip` before the run stops all the same."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Mixed precision; null: what `accelerate config` or `accelerate launch` says."""
    deterministic: bool = False
    """Only deterministic algorithms, bit-equal on the same GPU; slower. A CPU run is bit-equal without."""
    cpu_threads: int | None = None
    """Threads of a process; null: what the launcher says (`accelerate launch` says 1)."""
    compile: Literal["regional", "whole"] | None = None
    """torch.compile of the denoiser: its repeated blocks (starts sooner), or the whole; null: none."""
    channels_last: bool = False
    """Keep the weights of the denoiser's and the VAE's convolutions with their channels last: often faster with mixed
    precision."""
    plain_attention: bool = False
    """Attention as separate products instead of torch's fused kernel: faster on a CPU with small images, but slower and
    hungry for memory elsewhere."""
    tf32: bool = False
    """Round the factors of float32 products and convolutions to TF32 on an NVIDIA GPU: faster, less precise."""
    peak_tflops: float | None = None
    """The device's peak in 10¹² operations per second, which `mfu` is a share of; null: as listed for some GPUs."""
    profile: bool | int = False
    """Trace this many steps (true: 5) into `output_dir/profile`, after 3 to warm up."""
    log_every: int = 10
    """Steps between two lines of metrics (the loss is the mean since the last line)."""
    eval_every: int = 500
    """Steps between two evaluations: grids, validation loss and image metrics; 0: none."""
    save_every: int = 500
    """Steps between two checkpoints; 0: only at the end."""
    save_minutes: float | None = None
    """Minutes after which a checkpoint is written besides; null: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0: all."""
    report_to: str | list[str] | None = None
    """Accelerate trackers besides metrics.jsonl: `tensorboard`, `wandb`, … or a list of them."""


@dataclass
class OptimizerConfig:
    """Any optimizer of any library: its class and its arguments."""

    class_path: str = "torch.optim.AdamW"
    """Import path of the class."""
    init_args: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-4})
    """Arguments of the class, e.g. --optimizer.init_args.lr 1e-4."""


@dataclass
class LrSchedulerConfig:
    """diffusers' learning rate schedules."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant"
    )
    """The schedule over `train.max_steps`."""
    num_warmup_steps: int = 0
    """Steps over which the rate rises from 0."""


@dataclass
class SchedulerConfig:
    """The noise schedule; null: as the checkpoint has it."""

    name: str | None = None
    """diffusers' class of the sampler for grids and `pipeline/`, e.g. `DDIMScheduler`."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """How noise grows with the timestep (not for flow_prediction)."""
    num_train_timesteps: int | None = None
    """Timesteps of the schedule, 1000 as a rule."""
    rescale_betas_zero_snr: bool | None = None
    """End in pure noise (terminal SNR of zero; not for epsilon, which then says nothing of the image)."""
    flow_shift: float | None = None
    """Shift of flow_prediction's noise levels towards noise: σ becomes shift·σ / (1 + (shift - 1)·σ). 1: no shift."""
    flow_base_resolution: int | None = None
    """Multiply flow_shift (which has to be given) by resolution / flow_base_resolution: larger images need more
    noise."""


@dataclass
class TimestepsConfig:
    """Which noise levels are trained on how often."""

    density: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal", "table"] = "uniform"
    """Distribution of the timesteps; see `difftrain_utils/timesteps.py`."""
    stratified: bool = False
    """One timestep in each of batch_size equal parts of the distribution: less variance from step to step."""
    min: float = 0.0
    """Where the timesteps begin, as a fraction of the schedule."""
    max: float = 1.0
    """Where the timesteps end, as a fraction of the schedule."""
    logit_mean: float = 0.0
    """Mean of `logit_normal`."""
    logit_std: float = 1.0
    """Standard deviation of `logit_normal`."""
    mode_scale: float = 1.29
    """Scale of `mode`, between -1 and 1.75."""
    p_mean: float = -1.2
    """Mean of the logarithm of the noise-to-signal ratio, of `log_normal`."""
    p_std: float = 1.2
    """Standard deviation of that logarithm."""
    table: list[float] | None = None
    """Weights of equal parts of the schedule, of `table`: any number of them."""


@dataclass
class NoiseConfig:
    """The noise that samples are mixed with."""

    offset: float = 0.0
    """Add this much noise that is constant over a channel (0.1 is usual)."""
    pyramid_discount: float = 0.0
    """Add coarser noise, weighted by this to the power of its level (0.8 is usual; 0: none)."""
    input_perturbation: float = 0.0
    """Add this much more noise to the input, but not to the target (0.1 is usual)."""
    immiscible: bool = False
    """Give each image of a batch the noise that is nearest to it."""
    immiscible_batch_size: int | None = None
    """Samples among which `immiscible` assigns the noise; null: the batch, which then cannot be split."""


@dataclass
class StrategyConfig:
    """How a training sample is made out of the model's own predictions."""

    dream_training: bool = False
    """DREAM: train on the inputs that the model's own errors lead to."""
    dream_detail_preservation: float = 1.0
    """DREAM's p: 0 corrects all noise levels alike, larger values the noisier ones more."""
    dream_start_step: int = 0
    """The first step with DREAM."""
    dream_probability: float = 1.0
    """The share of samples with DREAM."""


@dataclass
class LossConfig:
    """How far a prediction is from its target, and how much each noise level counts."""

    type: Literal["mse", "l1", "huber", "smooth_l1"] = "mse"
    """The loss of an element; see `difftrain_utils/loss.py`."""
    huber_c: float = 0.1
    """Threshold of the huber losses, between quadratic and linear."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How the threshold falls with the noise level: from 1 to huber_c, or not."""
    weighting: Literal["uniform", "snr", "min_snr", "soft_min_snr", "p2", "debiased", "edm", "sigma_sqrt", "cosmap"] = (
        "uniform"
    )
    """Weight of a noise level; see `loss_weights` in `difftrain_utils/loss.py`."""
    learned_uncertainty: bool = False
    """EDM2's: learn how large the loss of each noise level is, and divide by it (on top of `weighting`)."""
    snr_gamma: float = 5.0
    """γ of min_snr and soft_min_snr (4 is usual for the latter)."""
    p2_gamma: float = 1.0
    """γ of p2."""
    p2_k: float = 1.0
    """k of p2."""
    edm_sigma_data: float = 0.5
    """Standard deviation of the data, of edm."""


@dataclass
class EmaConfig:
    """Exponential moving average of the weights; grids and `pipeline/` use it."""

    enabled: bool = True
    """Keep the average."""
    decay: float = 0.9999
    """The average's largest decay; at step s it is at most (1 + s) / (10 + s)."""
    update_every: int = 1
    """Steps between two updates of the average, which is as wide with any number."""
    on_cpu: bool = False
    """Keep the average in main memory instead of the GPU's; slower."""
    power_sigma_rels: list[float] = field(default_factory=list)
    """Widths of EDM2's power-function averages to keep besides, e.g. [0.05, 0.1]; their snapshots make an average of
    any width after the run (`python -m difftrain_utils.commands.posthoc_ema`)."""
    snapshot_every: int = 500
    """Steps between two snapshots of those averages, in `ema_snapshots/`."""


@dataclass
class EvaluationConfig:
    """The grid of images, the validation loss and the image metrics that show the progress."""

    prompts: list[str] = field(default_factory=list)
    """One image each."""
    seed: int = 0
    """Prompt i starts from the same noise every time."""
    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1: none."""
    batch_size: int = 8
    """Images generated at a time."""
    num_validation_samples: int = 256
    """Fixed (image, noise, noise level) triples of the validation loss."""
    num_validation_bins: int = 8
    """Noise levels from low to high that the validation loss is told for."""
    shapes_judge: bool = False
    """Count the images that show the colour and shape of their prompts (for `builtin:shapes`)."""
    fid_features: str | None = None
    """Network whose features FID and KID compare: an image model of transformers (a folder or hub name, such as
    `facebook/dinov2-base`) or `inception`; null: no FID and KID."""
    clip_score_model: str | None = None
    """CLIP model of the CLIP score (a folder or hub name, such as `openai/clip-vit-base-patch16`); null: none."""
    num_metric_images: int = 1000
    """Images generated for these metrics, from the captions of as many held-out images."""


@dataclass
class Config:
    """One run of `train_text_to_image.py`."""

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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def parse_config(argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """Read the config from a command line (`sys.argv` if None).

    Raises:
        InputError: a field or option does not exist, or a value is not allowed.
        SystemExit: after --help or --print_config.
    """
    argv = _expand_short_forms(sys.argv[1:] if argv is None else argv)
    parser = _build_parser(prog)
    _refuse_unknown_options(argv)
    try:
        namespace = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(_one_line(str(error))) from None
    sections = {
        section.name: section.type(**vars(getattr(namespace, section.name))) for section in dataclasses.fields(Config)
    }
    config = Config(**sections)
    if config.data.sources is not None:
        config.data.sources = [SourceConfig(**vars(source)) for source in config.data.sources]
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise InputError for the first value that is out of its range or does not fit another's."""
    model, data, train, ema, evaluation = config.model, config.data, config.train, config.ema, config.evaluation

    def require(allowed: bool, name: str, rule: str) -> None:
        if not allowed:
            section, field_name = name.split(".")
            value = getattr(getattr(config, section), field_name)
            raise InputError(f"{name}: {rule}, got {value!r}")

    require(model.pretrained_model_name_or_path != "", "model.pretrained_model_name_or_path", "must not be empty")
    check_sources(config, require)
    require(data.resolution >= 8, "data.resolution", "must be at least 8")
    require(0 <= data.caption_dropout <= 1, "data.caption_dropout", "must be between 0 and 1")
    require(0 <= data.validation_split < 1, "data.validation_split", "must be at least 0 and below 1")
    require(
        not (data.validation_split and data.validation_dir), "data.validation_dir", "cannot go with validation_split"
    )
    require(data.shuffle_buffer >= 1, "data.shuffle_buffer", "must be at least 1")
    if data.streaming:
        require(not data.validation_split, "data.validation_split", "cannot go with streaming (validation_dir can)")
        is_builtin = data.dataset is not None and data.dataset.startswith("builtin:")
        require(not is_builtin, "data.dataset", "streaming is for folders and the hub")
    require(
        not data.cache_latents or data.center_crop, "data.cache_latents", "needs data.center_crop (one crop is kept)"
    )
    sizes = data.buckets if isinstance(data.buckets, list) else [[8, 8]]
    require(
        len(sizes) > 0 and all(len(size) == 2 and min(size) >= 8 for size in sizes),
        "data.buckets", "must be sizes [height, width] of at least 8, or auto",
    )  # fmt: skip
    ratios = [size[0] / size[1] for size in sizes]
    require(len(set(ratios)) == len(ratios), "data.buckets", "must have different aspect ratios")
    for name in ("buckets", "cache_latents", "cache_text", "sources"):
        require(not (data.streaming and getattr(data, name)), f"data.{name}", "cannot go with data.streaming")
    require(data.num_workers >= 0, "data.num_workers", "must be 0 or more")
    require(train.output_dir != "", "train.output_dir", "must not be empty")
    require(train.seed >= 0, "train.seed", "must be 0 or more")
    for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every"):
        require(getattr(train, name) >= 1, f"train.{name}", "must be at least 1")
    for name in ("max_hours", "save_minutes", "num_processes", "peak_tflops"):
        value = getattr(train, name)
        require(value is None or value > 0, f"train.{name}", "must be above 0, or null")
    for name in ("eval_every", "save_every", "keep_checkpoints", "max_skipped_steps"):
        require(getattr(train, name) >= 0, f"train.{name}", "must be 0 or more")
    require(train.max_grad_norm is None or train.max_grad_norm > 0, "train.max_grad_norm", "must be above 0, or null")
    require(train.cpu_threads is None or train.cpu_threads >= 1, "train.cpu_threads", "must be at least 1, or null")
    require(not (train.overwrite and train.resume_from), "train.overwrite", "cannot go with train.resume_from")
    require(train.profile >= 0, "train.profile", "must be true, false or a number of steps")
    check_split(train, num_processes=1)
    warmup, name = config.lr_scheduler.num_warmup_steps, config.lr_scheduler.name
    require(warmup >= 0, "lr_scheduler.num_warmup_steps", "must be 0 or more")
    require(
        not (warmup and name == "constant"), "lr_scheduler.name", "has no warm-up (constant_with_warmup has, "
        f"lr_scheduler.num_warmup_steps is {warmup})",
    )  # fmt: skip
    check_objective(config, require)
    require(0 <= ema.decay < 1, "ema.decay", "must be at least 0 and below 1")
    require(ema.update_every >= 1, "ema.update_every", "must be at least 1")
    widths = ema.power_sigma_rels
    require(all(0 < w <= 0.28 for w in widths), "ema.power_sigma_rels", "must be above 0 and at most 0.28")
    require(
        all(round(w, 3) == w for w in widths) and len(set(widths)) == len(widths),
        "ema.power_sigma_rels", "must be different widths of three decimals at most",
    )  # fmt: skip
    require(ema.snapshot_every >= 1, "ema.snapshot_every", "must be at least 1")
    require(evaluation.num_inference_steps >= 1, "evaluation.num_inference_steps", "must be at least 1")
    require(evaluation.guidance_scale >= 1, "evaluation.guidance_scale", "must be at least 1")
    require(evaluation.batch_size >= 1, "evaluation.batch_size", "must be at least 1")
    bins = evaluation.num_validation_bins
    require(bins >= 1, "evaluation.num_validation_bins", "must be at least 1")
    require(
        evaluation.num_validation_samples >= bins and evaluation.num_validation_samples % bins == 0,
        "evaluation.num_validation_samples", f"must be a multiple of num_validation_bins, {bins}",
    )  # fmt: skip
    require(evaluation.seed >= 0, "evaluation.seed", "must be 0 or more")
    require(
        not evaluation.shapes_judge or data.dataset == "builtin:shapes",
        "evaluation.shapes_judge", f"needs data.dataset builtin:shapes (it is {data.dataset!r})",
    )  # fmt: skip
    for name in ("fid_features", "clip_score_model"):
        require(getattr(evaluation, name) != "", f"evaluation.{name}", "must not be empty")
        require(
            getattr(evaluation, name) is None or data.validation_split or data.validation_dir,
            f"evaluation.{name}", "needs held-out images: data.validation_split or data.validation_dir",
        )  # fmt: skip
    require(evaluation.num_metric_images >= 2, "evaluation.num_metric_images", "must be at least 2")


def check_sources(config: Config, require: Callable[[bool, str, str], None]) -> None:
    """The rules of `data.dataset`, `data.sources` and their columns."""
    data = config.data
    require(data.dataset != "", "data.dataset", "must not be empty")
    require(data.cache_dir != "", "data.cache_dir", "must not be empty")
    require(data.dataset is None or data.sources is None, "data.dataset", "cannot go with data.sources")
    require(data.dataset is not None or data.sources is not None, "data.dataset", "needed, or else data.sources")
    require(data.sources != [], "data.sources", "must have at least one source")
    require(data.caption_column not in ("", []), "data.caption_column", "must not be empty")
    weights = [source.weight for source in data.sources or []]
    for i, source in enumerate(data.sources or []):
        name = f"data.sources[{i}]"
        if source.dataset == "" or source.caption_column in ("", []):
            field_name = "dataset" if source.dataset == "" else "caption_column"
            raise InputError(f"{name}.{field_name}: must not be empty, got {getattr(source, field_name)!r}")
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise InputError(f"{name}.weight: must be above 0 and finite, or null, got {source.weight}")
        if (source.weight is None) != (weights[0] is None):
            raise InputError(f"{name}.weight: either all sources have a weight or none has, got {weights}")
    if data.sources is not None and data.validation_dir is None:  # these would have no effect
        for field_name in ("split", "image_column", "caption_column"):
            is_default = getattr(data, field_name) == getattr(DataConfig, field_name)
            require(is_default, f"data.{field_name}", "goes with data.dataset; each of data.sources has its own")


def check_objective(config: Config, require: Callable[[bool, str, str], None]) -> None:
    """The rules of the sections scheduler, timesteps, noise, strategy and loss."""
    scheduler, timesteps, noise = config.scheduler, config.timesteps, config.noise
    steps, base = scheduler.num_train_timesteps, scheduler.flow_base_resolution
    require(steps is None or steps >= 2, "scheduler.num_train_timesteps", "must be at least 2, or null")
    shift = scheduler.flow_shift
    require(shift is None or shift > 0, "scheduler.flow_shift", "must be above 0, or null")
    require(base is None or base >= 1, "scheduler.flow_base_resolution", "must be at least 1, or null")
    # null means the checkpoint's own shift, which may have been multiplied already
    require(base is None or shift is not None, "scheduler.flow_base_resolution", "needs scheduler.flow_shift")
    require(0 <= timesteps.min < timesteps.max, "timesteps.min", f"must be from 0 to below max, {timesteps.max}")
    require(timesteps.max <= 1, "timesteps.max", "must be at most 1")
    require(timesteps.logit_std > 0, "timesteps.logit_std", "must be above 0")
    require(-1 <= timesteps.mode_scale <= 1.75, "timesteps.mode_scale", "must be between -1 and 1.75")
    require(timesteps.p_std > 0, "timesteps.p_std", "must be above 0")
    is_table, table = timesteps.density == "table", timesteps.table
    require((table is not None) == is_table, "timesteps.table", "goes with timesteps.density table, and only with it")
    require(
        not is_table or (min(table, default=-1) >= 0 and sum(table) > 0),
        "timesteps.table", "must be weights of 0 or more, some above",
    )  # fmt: skip
    require(0 <= noise.pyramid_discount < 1, "noise.pyramid_discount", "must be at least 0 and below 1")
    require(noise.input_perturbation >= 0, "noise.input_perturbation", "must be 0 or more")
    size = noise.immiscible_batch_size
    require(size is None or noise.immiscible, "noise.immiscible_batch_size", "goes with noise.immiscible only")
    require(size is None or size >= 1, "noise.immiscible_batch_size", "must be at least 1, or null")
    strategy, loss = config.strategy, config.loss
    require(strategy.dream_detail_preservation >= 0, "strategy.dream_detail_preservation", "must be 0 or more")
    require(strategy.dream_start_step >= 0, "strategy.dream_start_step", "must be 0 or more")
    require(0 <= strategy.dream_probability <= 1, "strategy.dream_probability", "must be between 0 and 1")
    require(0 < loss.huber_c <= 1, "loss.huber_c", "must be above 0 and at most 1")
    require(loss.snr_gamma > 0, "loss.snr_gamma", "must be above 0")
    require(loss.p2_k > 0, "loss.p2_k", "must be above 0")
    require(loss.p2_gamma >= 0, "loss.p2_gamma", "must be 0 or more")
    require(loss.edm_sigma_data > 0, "loss.edm_sigma_data", "must be above 0")
    huber = loss.type in ("huber", "smooth_l1")
    require(
        huber or loss.huber_schedule == "constant", "loss.huber_schedule", f"does nothing for loss.type {loss.type}"
    )


def check_split(train: TrainConfig, num_processes: int) -> None:
    """Raise InputError unless a batch splits evenly over accumulation steps and processes."""
    parts = train.gradient_accumulation_steps * num_processes
    if train.batch_size % parts:
        allowed = [n for n in range(1, train.batch_size + 1) if train.batch_size % (n * num_processes) == 0]
        below = train.batch_size // parts * parts
        sizes = f"{below} or {below + parts}" if below else f"{parts}"
        raise InputError(
            f"train.batch_size: {train.batch_size} does not divide by train.gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps} × {num_processes} processes; batch_size {sizes} would"
            + (f", or gradient_accumulation_steps {', '.join(map(str, allowed))}" if allowed else "")
        )


def check_immiscible(config: Config, num_processes: int) -> None:
    """Raise InputError unless each group of immiscible noise lies in one part of a batch."""
    parts = config.train.gradient_accumulation_steps * num_processes
    part, group = config.train.batch_size // parts, config.noise.immiscible_batch_size or config.train.batch_size
    if config.noise.immiscible and part % group:
        got = config.noise.immiscible_batch_size or "null (the whole batch)"
        raise InputError(
            f"noise.immiscible_batch_size: must divide a part of the batch, which is {part} (train.batch_size "
            f"{config.train.batch_size} in {parts} parts), got {got}"
        )


def field_names() -> list[str]:
    """The dotted names of all fields, in order."""
    return [f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(s.type)]


def _build_parser(prog: str | None) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog or os.path.basename(sys.argv[0]),
        description="Every field of the config, by its dotted name. --output-dir and --resume-from are short "
        "for --train.output_dir and --train.resume_from.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of the fields below.")
    for section in dataclasses.fields(Config):
        if section.type is not OptimizerConfig:
            parser.add_class_arguments(section.type, section.name)
    # By hand: jsonargparse would take these two names for a class of its own to build, and import torch.
    optimizer = parser.add_argument_group("Any optimizer of any library: its class and its arguments")
    default = OptimizerConfig()
    optimizer.add_argument(
        "--optimizer.class_path", type=str, default=default.class_path, help="Import path of the class."
    )
    optimizer.add_argument(
        "--optimizer.init_args",
        type=dict[str, Any],
        default=default.init_args,
        help="Arguments of the class, e.g. --optimizer.init_args.lr 1e-4.",
    )
    return parser


def _expand_short_forms(argv: Sequence[str]) -> list[str]:
    """--output-dir is --train.output_dir, and a switch without a value (--train.overwrite) means true."""
    expanded = []
    for arg, following in zip(argv, [*argv[1:], "--"], strict=True):
        name, equals, value = arg.partition("=")
        expanded.append(ALIASES.get(name, name) + equals + value)
        if name[2:] in _switches() and not equals and following.startswith("--"):
            expanded.append("true")
    return expanded


def _switches() -> list[str]:
    return [
        f"{s.name}.{f.name}"
        for s in dataclasses.fields(Config)
        for f in dataclasses.fields(s.type)
        if f.type in (bool, bool | None, bool | int)
    ]


def _refuse_unknown_options(argv: Sequence[str]) -> None:
    """Look at names before values: an unknown name gets a suggestion, which jsonargparse does not give."""
    known = field_names()
    for position, arg in enumerate(argv):
        if not arg.startswith("--"):
            continue
        name, _, value = arg[2:].partition("=")
        value = value or (argv[position + 1] if position + 1 < len(argv) else "")
        if name == "config":
            path = value
            for unknown in _unknown_fields(path):
                raise InputError(f"{path}: {_no_such_field(unknown, known)}")
        elif (
            name not in [*known, "help", "print_config"]
            and name.removesuffix("+") not in known
            and not name.startswith("optimizer.init_args.")
        ):
            raise InputError(f"--{_no_such_field(name, known, '--')}")
        elif name.removesuffix("+") == "data.sources":
            with contextlib.suppress(yaml.YAMLError):  # jsonargparse tells what is wrong with it
                for unknown in _unknown_source_fields(yaml.safe_load(value)):
                    raise InputError(f"--{_no_such_field(unknown, known)}")


def _unknown_fields(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: must hold sections ({', '.join(_sections())}), got {content!r:.60}")
    for section, fields in content.items():
        if section not in _sections():
            yield str(section)
        elif not isinstance(fields, dict):
            raise InputError(f"{path}: {section}: must hold fields, got {fields!r:.60}")
        else:
            yield from (f"{section}.{name}" for name in fields if f"{section}.{name}" not in field_names())
            if section == "data":
                yield from _unknown_source_fields(fields.get("sources"))


def _unknown_source_fields(sources: Any) -> Iterator[str]:
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            yield from (f"data.sources[{i}].{name}" for name in source if name not in _source_fields())


def _source_fields() -> list[str]:
    return [f.name for f in dataclasses.fields(SourceConfig)]


def _sections() -> list[str]:
    return [section.name for section in dataclasses.fields(Config)]


def _no_such_field(name: str, known: list[str], prefix: str = "") -> str:
    if name.startswith("data.sources["):
        last = name.rpartition(".")[2]
        matches = difflib.get_close_matches(last, _source_fields(), n=1, cutoff=0.7)
        hint = f"did you mean {matches[0]}?" if matches else f"a source has {', '.join(_source_fields())}"
        return f"{name}: no such field; {hint}"
    matches = difflib.get_close_matches(name, known if "." in name else _sections(), n=1, cutoff=0.7)
    if not matches:  # a field's name with another section's or none: there may be one in more than one section
        last_parts = difflib.get_close_matches(name.split(".")[-1], {k.split(".")[1] for k in known}, n=1, cutoff=0.7)
        matches = [k for k in known if k.split(".")[1] in last_parts]
    hint = f"did you mean {' or '.join(prefix + match for match in matches)}?" if matches else "see --help"
    return f"{name}: no such field; {hint}"


def _one_line(message: str) -> str:
    """jsonargparse's message as one line, e.g. `train.max_steps: Expected a <class 'int'>. Got value: x`."""
    if in_source := re.search(r"SourceConfig':(.*?)\n    - Expected a <class 'NoneType'>", message, re.DOTALL):
        problem = " ".join(in_source[1].replace("Parser key", "field").split())
        return f"data.sources: an item: {re.sub(r'Does not .* Errors: ', '', problem)}"
    if "Union subtypes" in message:
        name = message.split('"')[1]
        expected = [
            line.strip(" -").removeprefix("Expected a ") for line in message.splitlines() if "- Expected" in line
        ]
        value = message.rsplit("Given value: ", 1)[-1]
        message = f"{name}: Expected {' or '.join(expected)}. Got value: {value}"
    message = message.replace('Parser key "', "").replace('":', ":")
    message = message.replace("typing.Literal", "one of ").replace("<class 'NoneType'>", "null")
    return " ".join(message.split())
