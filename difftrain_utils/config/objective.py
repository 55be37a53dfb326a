"""What is trained: noise schedule, timesteps, noise, strategy and loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from difftrain_utils.config.config import Require


@dataclass
class SchedulerConfig:
    """The noise schedule; null: as the checkpoint has it."""

    path: Literal["ddpm", "linear", "cosine"] | None = None
    """How latents and noise are mixed, see `difftrain_utils/objective/schedule.py`; null: as the checkpoint has it, or
    `linear` for flow_prediction."""
    sampler: str | None = None
    """diffusers' class of the sampler for grids and `pipeline/`, e.g. `DDIMScheduler`."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """How noise grows with the timestep, on the path `ddpm`."""
    num_train_timesteps: int | None = None
    """Timesteps of the schedule, 1000 as a rule."""
    rescale_betas_zero_snr: bool | None = None
    """End the path `ddpm` in pure noise (terminal SNR of zero; not for epsilon, which has no image in it then)."""
    flow_shift: float | None = None
    """Shift of the path `linear` towards noise: σ becomes shift·σ / (1 + (shift - 1)·σ). 1: no shift."""
    flow_shift_by_tokens: list[list[float]] | None = None
    """Two pairs of a number of the model's tokens and a shift, `[[256, 1.65], [4096, 3.16]]`, instead of one shift for
    all sizes: the logarithm of a size's is linear in its number of tokens (Flux, LTX-Video)."""
    flow_base_resolution: int | None = None
    """Multiply flow_shift (which has to be given) by resolution / flow_base_resolution: larger images need more
    noise."""

    def check(self, require: Require) -> None:
        steps, shift, base = self.num_train_timesteps, self.flow_shift, self.flow_base_resolution
        require(steps is None or steps >= 2, "num_train_timesteps", "must be at least 2, or null")
        require(shift is None or shift > 0, "flow_shift", "must be above 0, or null")
        by_tokens = self.flow_shift_by_tokens
        pairs = [[1, 1], [2, 1]] if by_tokens is None else by_tokens
        are_two = len(pairs) == 2 and all(len(pair) == 2 and min(pair) > 0 for pair in pairs)
        rule = "must be two rising numbers of tokens, each with a shift above 0, or null"
        require(are_two and pairs[0][0] < pairs[1][0], "flow_shift_by_tokens", rule)
        require(by_tokens is None or shift is None, "flow_shift_by_tokens", "goes without scheduler.flow_shift")
        require(base is None or base >= 1, "flow_base_resolution", "must be at least 1, or null")
        # null means the checkpoint's own shift, which may have been multiplied already
        require(base is None or shift is not None, "flow_base_resolution", "needs scheduler.flow_shift")


@dataclass
class TimestepsConfig:
    """Which noise levels are trained on how often."""

    density: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal", "table"] = "uniform"
    """Distribution of the timesteps; see `difftrain_utils/objective/timesteps.py`."""
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
    p_mean: float | None = None
    """Mean of the logarithm of the noise-to-signal ratio, of `log_normal`, which needs it. EDM's -1.2 is for data of
    standard deviation 0.5: latents, of about 1, have -1.2 + ln(1 / 0.5) = -0.5, and EDM2's -0.4 is 0.3."""
    p_std: float = 1.2
    """Standard deviation of that logarithm: 1.2 in EDM, 1.0 in EDM2."""
    table: list[float] | None = None
    """Weights of equal parts of the schedule, of `table`: any number of them."""

    def check(self, require: Require) -> None:
        require(0 <= self.min < self.max, "min", f"must be from 0 to below max, {self.max}")
        require(self.max <= 1, "max", "must be at most 1")
        require(self.logit_std > 0, "logit_std", "must be above 0")
        require(-1 <= self.mode_scale <= 1.75, "mode_scale", "must be between -1 and 1.75")
        require(self.p_std > 0, "p_std", "must be above 0")
        has_mean = self.density != "log_normal" or self.p_mean is not None
        require(
            has_mean, "p_mean", "is needed by log_normal: -1.2 + ln(sd of the data / 0.5) is EDM's, so -0.5 for sd 1"
        )
        is_table, table = self.density == "table", self.table
        require((table is not None) == is_table, "table", "goes with timesteps.density table, and only with it")
        are_weights = not is_table or (min(table, default=-1) >= 0 and sum(table) > 0)
        require(are_weights, "table", "must be weights of 0 or more, some above")


@dataclass
class NoiseConfig:
    """The noise that samples are mixed with."""

    offset: float = 0.0
    """Add this much noise that is constant over a channel (0.1 is usual)."""
    pyramid_discount: float = 0.0
    """Add coarser noise, weighted by this to the power of its level (0.8 is usual; 0: none)."""
    input_perturbation: float = 0.0
    """Add this much more noise to the input, but not to the target (0.1 is usual)."""
    pairing: Literal["nearest", "transport", "knn"] | None = None
    """Which noise a sample gets of that of a batch, or of `train.group_size` samples of it: `nearest`, the least sum of
    distances (immiscible diffusion); `transport`, the least sum of squared ones among samples of the same caption; or
    `knn`, the nearest of several that are drawn for the sample alone. null: any."""
    knn_candidates: int = 4
    """How many are drawn for a sample, of `knn`; the more, the less noise the nearest is."""
    frame_correlation: ClassVar[None] = None  # of videos: config/text_to_video.py

    def check(self, require: Require) -> None:
        require(0 <= self.pyramid_discount < 1, "pyramid_discount", "must be at least 0 and below 1")
        require(self.input_perturbation >= 0, "input_perturbation", "must be 0 or more")
        require(self.knn_candidates >= 2, "knn_candidates", "must be at least 2")
        is_used = self.pairing == "knn" or self.knn_candidates == NoiseConfig.knn_candidates
        require(is_used, "knn_candidates", "goes with noise.pairing knn")

    @property
    def pairs_samples(self) -> bool:
        """Whether samples are given noise of each other."""
        return self.pairing in ("nearest", "transport")


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

    def check(self, require: Require) -> None:
        require(self.dream_detail_preservation >= 0, "dream_detail_preservation", "must be 0 or more")
        require(self.dream_start_step >= 0, "dream_start_step", "must be 0 or more")
        require(0 <= self.dream_probability <= 1, "dream_probability", "must be between 0 and 1")


@dataclass
class LossConfig:
    """How far a prediction is from its target, and how much each noise level counts."""

    type: Literal["mse", "l1", "huber", "smooth_l1"] = "mse"
    """The loss of an element; see `difftrain_utils/objective/loss.py`."""
    huber_c: float = 0.1
    """Threshold of the huber losses, between quadratic and linear."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """How the threshold falls with the noise level: from 1 to huber_c, or not."""
    weighting: Literal[
        "uniform", "snr", "min_snr", "soft_min_snr", "p2", "debiased", "edm", "flow", "sigma_sqrt", "cosmap"
    ] = "uniform"
    """Weight of a noise level; see `loss_weights` in `difftrain_utils/objective/loss.py`."""
    learned_uncertainty: bool = False
    """EDM2's: learn how large the loss of each noise level is, and divide by it (on top of `weighting`)."""
    contrastive: float = 0.0
    """λ of contrastive flow matching: push predictions away from the targets of other samples of the batch, or of its
    `train.group_size` samples (0.05 is usual; 0: not)."""
    snr_gamma: float = 5.0
    """γ of min_snr and soft_min_snr (4 is usual for the latter)."""
    p2_gamma: float = 1.0
    """γ of p2."""
    p2_k: float = 1.0
    """k of p2."""
    edm_sigma_data: float | None = None
    """Standard deviation of the data, of edm, which needs it; that of latents is about 1, EDM's pixels had 0.5."""

    def check(self, require: Require) -> None:
        require(0 < self.huber_c <= 1, "huber_c", "must be above 0 and at most 1")
        rule = "must be at least 0 and below 1, from where on no prediction is the best"
        require(0 <= self.contrastive < 1, "contrastive", rule)
        rule = "cannot go with loss.learned_uncertainty, which takes losses above 0 for granted"
        require(not (self.contrastive and self.learned_uncertainty), "contrastive", rule)
        require(self.snr_gamma > 0, "snr_gamma", "must be above 0")
        require(self.p2_k > 0, "p2_k", "must be above 0")
        require(self.p2_gamma >= 0, "p2_gamma", "must be 0 or more")
        has_sd = self.weighting != "edm" or self.edm_sigma_data is not None
        require(has_sd, "edm_sigma_data", "is needed by edm: the standard deviation of the data, about 1 for latents")
        require(self.edm_sigma_data is None or self.edm_sigma_data > 0, "edm_sigma_data", "must be above 0")
        has_threshold = self.type in ("huber", "smooth_l1") or self.huber_schedule == "constant"
        require(has_threshold, "huber_schedule", f"does nothing for loss.type {self.type}")
