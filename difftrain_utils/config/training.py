"""The run, its optimizer and learning rate, and the averages of the weights."""

import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from difftrain_utils.config.config import Require, require_of
from difftrain_utils.errors import InputError

SOURCES = ("weights", "data", "noise")  # of what is random, each with its seed
MAX_BATCH = 2**20  # samples of a step; more is a slip
DEFAULT_STEPS = 1000
BEST_IS = {  # of the metrics of an evaluation
    **dict.fromkeys(("validation_loss", "validation_loss_ema", "fid", "kid", "fvd", "kvd", "fad", "kad"), "lowest"),
    **dict.fromkeys(("clip_score", "clap_score", "shapes_preferred", "valid"), "highest"),
    **dict.fromkeys(("shapes_right", "scenes_right", "moving_shapes_right", "tones_right"), "highest"),
    **dict.fromkeys(("validation_implicit_accuracy", "validation_implicit_accuracy_ema"), "highest"),
}


@dataclass
class SeedsConfig:
    """Seeds by what is drawn, so that one can be varied alone."""

    weights: int | None = None
    """Initial weights, also of adapters; null: `train.seed`."""
    data: int | None = None
    """Which row, crop, flip and caption each sample has, and whether its caption is dropped; null: `train.seed`."""
    noise: int | None = None
    """Noise, timesteps or masks of each sample, and what the model draws, such as dropout; null: `train.seed`."""

    def check(self, require: Require) -> None:
        for name in SOURCES:
            value = getattr(self, name)
            require(value is None or value >= 0, name, "must be 0 or more, or null")


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
    seeds: SeedsConfig | None = None
    """Other seeds for some of it, one by one: `--train.seeds.noise 1`; null: `seed` for all."""
    max_steps: int | None = None
    """Optimizer steps; null: as many as `data.epochs` are, or else 1000."""
    max_hours: float | None = None
    """Save and stop after this time, to be resumed; null: no limit."""
    batch_size: int = 16
    """Samples of one optimizer step, over all processes and accumulation steps."""
    group_size: int | None = None
    """Samples in a row among which methods of several samples work (`noise.pairing`, `loss.contrastive`); null:
    the whole batch, which then cannot be split."""
    num_processes: int | None = None
    """Refuse to start with another number of processes; null: with any."""
    init_minutes: float = 10.0
    """Minutes for all processes to come, and as many again to connect, before the run ends with an error."""
    step_minutes: float | None = 30.0
    """Minutes for a step to end, its data and what it compiles included, before a process that hangs ends with an
    error, to be started again; null: no limit."""
    shard: Literal["none", "full"] = "none"
    """Give each process a share of weights, gradients, optimizer state and averages (FSDP2), instead of all of them."""
    shard_size: int | None = None
    """Share among so many processes, and have such groups of them hold the same (HSDP); null: among all."""
    reshard_after_forward: bool = True
    """With `shard`: let go of a block's gathered weights after its forward pass and gather them again for the backward
    pass (ZeRO-3); false: keep them until then (ZeRO-2), which is faster and takes more memory."""
    shard_offload: bool = False
    """With `shard`: keep the shares in main memory instead of the GPU's; slower."""
    shard_encoders: bool = False
    """Share out the frozen text encoders as well: slower, for those that are larger than the denoiser."""
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
    """Steps between two evaluations: grids, validation loss and metrics; 0: none."""
    save_every: int = 500
    """Steps between two checkpoints; 0: only at the end."""
    save_minutes: float | None = None
    """Minutes after which a checkpoint is written besides; null: none."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0: all."""
    save_in_background: bool = False
    """Write checkpoints while training goes on, from a copy of them in main memory; each is there `log_every` steps
    later."""
    save_weights_every: int = 0
    """Steps between two files of the trained weights alone, in `weights/`, all of which are kept; 0: none."""
    keep_best: str | None = None
    """Keep the weights of the best evaluation as `weights/best.safetensors`: by `validation_loss` (of the raw weights),
    `validation_loss_ema`, `fid`, `kid`, `clip_score`, `shapes_right` or `scenes_right`, of pairs also
    `validation_implicit_accuracy`, the same with `_ema`, or `shapes_preferred`, of texts `valid`, of videos
    `moving_shapes_right`, `fvd` or `kvd`, or of sounds `tones_right`, `fad`, `kad` or `clap_score`; null: none."""
    record_diff: Literal["full", "redacted", "digest"] = "redacted"
    """What `run_manifest.json` records of changes that are not committed: all, or without what looks like a secret, or
    their SHA-256."""
    report_to: str | list[str] | None = None
    """Accelerate trackers besides metrics.jsonl: `tensorboard`, `wandb`, … or a list of them."""
    project: str = "difftrain"
    """What trackers call the project, or experiment, of the run."""
    run_name: str | None = None
    """What trackers call the run; null: as its folder. TensorBoard shows the folder."""

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)

    def check(self, require: Require) -> None:
        require(self.output_dir != "", "output_dir", "must not be empty")
        require(self.output_dir[:1] != "~", "output_dir", "there is no such user's home")
        require("\0" not in self.output_dir, "output_dir", "must have no null character")
        require("://" not in self.output_dir, "output_dir", "must be a folder of this machine")
        is_name = re.fullmatch(r"\w[\w .-]*", self.project) is not None  # a folder of TensorBoard's is called so
        require(is_name, "project", "must be letters, digits, spaces, dots, - and _")
        require(self.run_name != "", "run_name", "must not be empty")
        require(self.seed >= 0, "seed", "must be 0 or more")
        if self.seeds is not None:
            self.seeds.check(require_of(self.seeds, "train.seeds"))
        rule = f"must be at most {MAX_BATCH} (MAX_BATCH in difftrain_utils/config/training.py)"
        require(self.batch_size <= MAX_BATCH, "batch_size", rule)
        for name in ("batch_size", "gradient_accumulation_steps", "log_every"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", "must be at least 1")
        require(self.init_minutes > 0, "init_minutes", "must be above 0")
        for name in ("max_hours", "save_minutes", "step_minutes", "num_processes", "peak_tflops", "max_grad_norm"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be above 0, or null")
        for name in ("eval_every", "save_every", "keep_checkpoints", "save_weights_every", "max_skipped_steps"):
            require(getattr(self, name) >= 0, name, "must be 0 or more")
        for name in ("cpu_threads", "group_size", "shard_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1, or null")
        rule = f"must be one of {', '.join(BEST_IS)}, or null"
        require(self.keep_best is None or self.keep_best in BEST_IS, "keep_best", rule)
        for name in ("shard_size", "shard_offload", "shard_encoders"):
            require(self.shard == "full" or not getattr(self, name), name, "needs train.shard full")
        require(not (self.overwrite and self.resume_from), "overwrite", "cannot go with train.resume_from")
        require(self.profile >= 0, "profile", "must be true, false or a number of steps")
        fits = (self.max_steps or 0) * self.batch_size < 2**63
        require(fits, "max_steps", f"times train.batch_size, {self.batch_size}, must be below 2^63")
        self.check_split(num_processes=1)

    def seed_of(self, source: str) -> int:
        """The seed of one of `SOURCES`."""
        given = self.seeds and getattr(self.seeds, source)
        return self.seed if given is None else given

    def steps_of(self, epochs: float, samples_per_epoch: int) -> int:
        """The optimizer steps that so many epochs are, the last one full; of 0.1 epochs exactly a tenth."""
        return math.ceil(Fraction(str(epochs)) * samples_per_epoch / self.batch_size)

    def check_split(self, num_processes: int) -> None:
        """Raise InputError unless a batch splits evenly over accumulation steps and processes."""
        parts = self.gradient_accumulation_steps * num_processes
        if self.batch_size % parts:
            numbers = range(1, min(self.batch_size, 1000) + 1)
            allowed = [n for n in numbers if self.batch_size % (n * num_processes) == 0]
            below = self.batch_size // parts * parts
            sizes = f"{below} or {below + parts}" if below else f"{parts}"
            raise InputError(
                f"train.batch_size: {self.batch_size} does not divide by train.gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} × {num_processes} processes; batch_size {sizes} would"
                + (f", or gradient_accumulation_steps {', '.join(map(str, allowed))}" if allowed else "")
            )

    def check_shards(self, num_processes: int, mixed_precision: str | None) -> None:
        """Raise InputError unless the processes can share out what is trained, in this precision."""
        if self.shard_size is not None and num_processes % self.shard_size:
            raise InputError(f"train.shard_size: must divide {num_processes}, the processes, got {self.shard_size}")
        if self.shard == "full" and mixed_precision == "fp16":
            raise InputError("train.precision: fp16 is not with train.shard full; there is bf16 and fp32")

    def check_groups(self, num_processes: int) -> None:
        """Raise InputError unless each group of `group_size` samples lies in one part of a batch."""
        parts = self.gradient_accumulation_steps * num_processes
        part, group = self.batch_size // parts, self.group_size or self.batch_size
        if part % group:
            raise InputError(
                f"train.group_size: must divide a part of the batch, which is {part} (train.batch_size "
                f"{self.batch_size} in {parts} parts), got {self.group_size or 'null (the whole batch)'}"
            )


@dataclass
class OptimizerConfig:
    """Any optimizer of any library: its class and its arguments."""

    class_path: str = "torch.optim.AdamW"
    """Import path of the class."""
    init_args: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-4})
    """Arguments of the class, e.g. --optimizer.init_args.lr 1e-4."""
    groups: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"uncertainty.*": {"lr": 1e-2, "weight_decay": 0.0}}
    )
    """Other arguments for some parameters, by patterns of MODEL.PARAMETER, of which later ones win: `{"*.bias":
    {weight_decay: 0}, "denoiser.*norm*": {weight_decay: 0}}`. EDM2's uncertainty has its own rate by default."""

    def check(self, require: Require) -> None:
        """The rest is up to `build_optimizer`, which asks the class."""
        are_dicts = all(isinstance(options, dict) and "params" not in options for options in self.groups.values())
        require(are_dicts, "groups", "must be {pattern: {argument: value}}")


@dataclass
class LrSchedulerConfig:
    """diffusers' learning rate schedules."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant"
    )
    """The schedule over `train.max_steps`."""
    num_warmup_steps: int = 0
    """Steps over which the rate rises from 0."""

    def check(self, require: Require) -> None:
        warmup = self.num_warmup_steps
        require(warmup >= 0, "num_warmup_steps", "must be 0 or more")
        rule = f"has no warm-up (constant_with_warmup has, lr_scheduler.num_warmup_steps is {warmup})"
        require(not (warmup and self.name == "constant"), "name", rule)


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
    any width after the run (`difftrain posthoc-ema`)."""
    snapshot_every: int = 500
    """Steps between two snapshots of those averages, in `ema_snapshots/`."""

    def check(self, require: Require) -> None:
        require(0 <= self.decay < 1, "decay", "must be at least 0 and below 1")
        require(self.update_every >= 1, "update_every", "must be at least 1")
        widths = self.power_sigma_rels
        require(all(0 < w <= 0.28 for w in widths), "power_sigma_rels", "must be above 0 and at most 0.28")
        are_names = all(round(w, 3) == w for w in widths) and len(set(widths)) == len(widths)
        require(are_names, "power_sigma_rels", "must be different widths of three decimals at most")
        require(self.snapshot_every >= 1, "snapshot_every", "must be at least 1")
