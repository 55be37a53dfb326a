"""How far a prediction is from its target, and how much each noise level counts."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from difftrain_utils.config.objective import LossConfig
from difftrain_utils.keyed_random import generator_for, randn
from difftrain_utils.objective.schedule import Schedule, append_dims

VANISHING = ("snr", "min_snr", "soft_min_snr", "p2", "debiased")


def sample_losses(
    config: LossConfig,
    schedule: Schedule,
    output: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted loss of each sample, shape (batch,): the mean over its elements, of `elementwise_loss` times
    `loss_weights`, and times `masks` (batch, 1, height, width) in [0, 1], of the images' size or the latents', or of
    videos (batch, 1, frames, 1, 1). The mean is over all elements, not those that count alone, as in kohya's scripts: a
    sample of which half counts has half of the loss. Masks of sounds, (batch, 1, length), have a mean of 1, so that it
    is over what counts (`media.audio`)."""
    losses = elementwise_loss(config, schedule, output, target, timesteps)
    if masks is not None:
        losses = losses * scale_masks(masks, losses.shape[2:])
    weights = loss_weights(config, schedule, timesteps)
    if weights.ndim == 1:
        return losses.flatten(1).mean(1) * weights
    return (losses * append_dims(weights, losses)).flatten(1).mean(1)


def scale_masks(masks: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Masks (batch, 1, height, width), or (batch, 1, length), of the size of latents, by the mean over each area; those
    of videos' frames as they are."""
    return masks if masks.ndim == 5 else F.interpolate(masks, tuple(size), mode="area")


def elementwise_loss(
    config: LossConfig, schedule: Schedule, output: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The loss of each element, of the target's shape (batch, channels, …). With d = output - target:

    - `mse`: d²
    - `l1`: |d|
    - `huber`: 2c(sqrt(d² + c²) - c), d² for small d and 2c|d| for large
    - `smooth_l1`: 2(sqrt(d² + c²) - c), d²/c for small d and 2|d| for large

    The last two are the pseudo-Huber losses of Khrapov et al. 2024, arXiv:2403.16728, c from `huber_threshold`.
    """
    difference = output - target
    if config.type == "mse":
        return difference.square()
    if config.type == "l1":
        return difference.abs()
    threshold = append_dims(huber_threshold(config, schedule, timesteps), difference)
    # (sqrt(d² + c²) - c) without the cancellation at small d
    pseudo_huber = difference.square() / ((difference.square() + threshold.square()).sqrt() + threshold)
    return 2 * pseudo_huber * (threshold if config.type == "huber" else 1)


def huber_threshold(config: LossConfig, schedule: Schedule, timesteps: torch.Tensor) -> torch.Tensor:
    """c of the pseudo-Huber losses, of the timesteps' shape, between `huber_c` and 1.

    - `constant`: huber_c
    - `exponential`: huber_c^(t/T), 1 without noise and huber_c at full noise
    - `snr`: (1 - huber_c) / (1 + s/a)² + huber_c
    """
    c = torch.full(timesteps.shape, config.huber_c, device=timesteps.device)
    if config.huber_schedule == "exponential":
        return c ** (timesteps / schedule.num_train_timesteps)
    if config.huber_schedule == "snr":
        return (1 - c) / (1 + schedule.snr(timesteps) ** -0.5) ** 2 + c
    return c


def loss_weights(config: LossConfig, schedule: Schedule, timesteps: torch.Tensor) -> torch.Tensor:
    """The weight of the loss at each timestep in the model's own parametrisation, of the timesteps' shape.

    `uniform` is 1, and so weighs the parametrisations differently. All others state a weight w on the error of the
    clean latents, |x̂_0 - x_0|², and come out the same for every prediction type: this returns w / c, for at a given
    x_t the loss in the model's parametrisation is c·|x̂_0 - x_0|² (see `Schedule.error_scale`). With SNR = a²/s², σ =
    s/a:

    - `snr`: SNR, which is uniform for epsilon (Ho et al. 2020)
    - `min_snr`: min(SNR, γ), γ = `snr_gamma` (Hang et al. 2023, arXiv:2303.09556). For v this is
      min(SNR, γ) / (SNR + 1), as the paper has it; trainers that divide by SNR alone train another weighting.
    - `soft_min_snr`: SNR·γ / (SNR + γ) (Crowson et al. 2024, arXiv:2401.11605)
    - `p2`: SNR / (k + SNR)^γ, `p2_k` and `p2_gamma` (Choi et al. 2022, arXiv:2204.00227, on the epsilon loss)
    - `debiased`: sqrt(SNR) (Yu et al. 2023, arXiv:2310.08442: 1/sqrt(SNR) on the epsilon loss). For v this is
      sqrt(SNR) / (SNR + 1); trainers that use 1/(SNR + 1) or 1/sqrt(SNR) for v leave the derivation.
    - `edm`: (σ² + σ_d²) / (σ·σ_d)², `edm_sigma_data` (Karras et al. 2022, arXiv:2206.00364, table 1)
    - `sigma_sqrt`, `cosmap`: σ_f⁻² and 2 / (π(1 - 2σ_f + 2σ_f²)) on the flow loss, σ_f = s/(a + s) (Esser et al. 2024,
      arXiv:2403.03206, as diffusers has them; but σ_f⁻² is 10⁶ at most)
    - `flow`: σ_f⁻², which is uniform for flow, but 400 at most (Li and He 2025, arXiv:2511.13720, for x_0 predictions)

    Those that vanish with the SNR (`VANISHING`) are 1 at a timestep without any signal, which would not be trained
    otherwise; so the code of Min-SNR has it.
    """
    if config.weighting == "uniform":
        return torch.ones(timesteps.shape, device=timesteps.device)
    weights = clean_weight(config, schedule.snr(timesteps)) / schedule.error_scale(timesteps)
    if schedule.has_zero_terminal_snr and config.weighting in VANISHING:
        alphas, _ = schedule.alphas_and_sigmas(timesteps)
        weights = torch.where(alphas == 0, 1.0, weights)
    return weights


def clean_weight(config: LossConfig, snr: torch.Tensor) -> torch.Tensor:
    """The weight w(SNR) on the error of the clean latents: see `loss_weights`."""
    gamma, sigmas = config.snr_gamma, snr**-0.5
    flow_sigmas = sigmas / (1 + sigmas)
    flow_scale = flow_sigmas**-2  # a velocity's error, in clean latents': u - û = -(x_0 - x̂_0) / σ_f
    return {
        "snr": lambda: snr,
        "min_snr": lambda: snr.clamp(max=gamma),
        "soft_min_snr": lambda: snr * gamma / (snr + gamma),
        "p2": lambda: snr / (config.p2_k + snr) ** config.p2_gamma,
        "debiased": lambda: snr.sqrt(),
        "edm": lambda: (sigmas**2 + config.edm_sigma_data**2) / (sigmas * config.edm_sigma_data) ** 2,
        "flow": lambda: flow_sigmas.clamp(min=0.05) ** -2,
        "sigma_sqrt": lambda: flow_sigmas.clamp(min=1e-3) ** -2 * flow_scale,
        "cosmap": lambda: 2 / (math.pi * (1 - 2 * flow_sigmas + 2 * flow_sigmas**2)) * flow_scale,
    }[config.weighting]()


class LearnedUncertainty(torch.nn.Module):
    """EDM2's learned loss weighting (Karras et al. 2024, arXiv:2312.02696, section 2.2): loss / exp(u) + u.

    u is a linear function of Fourier features of the noise level c = ln(σ)/4, trained along with the denoiser. At its
    minimum exp(u) is the expected loss of the noise level, so that all levels contribute gradients of like size. It
    starts at u = 0, the loss as it was.
    """

    def __init__(self, num_features: int = 128):
        super().__init__()
        generator = generator_for(0, "uncertainty_features", 0)  # fixed: no part of a run's randomness
        self.register_buffer("frequencies", 2 * math.pi * randn(generator, num_features))
        self.register_buffer("phases", torch.from_numpy(2 * math.pi * generator.random(num_features)).float())
        self.weight = torch.nn.Parameter(torch.zeros(num_features))

    def forward(self, losses: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
        """Weighted losses of shape (batch,) from losses and signal-to-noise ratios of that shape."""
        noise_level = -snr.log() / 8  # ln(σ)/4, σ = SNR^(-1/2)
        features = math.sqrt(2) * torch.cos(noise_level[:, None] * self.frequencies + self.phases)
        log_uncertainty = (features * self.weight).sum(1) / math.sqrt(len(self.weight))  # float32 under autocast, too
        return losses / log_uncertainty.exp() + log_uncertainty
