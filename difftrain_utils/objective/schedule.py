"""Noisy latents, and what the denoiser has to predict from them: a schedule is a path × a prediction type.

Every path mixes x_t = a·x_0 + s·ε:

- `ddpm`: a = sqrt(ᾱ_t), s = sqrt(1 - ᾱ_t), t an integer (Ho et al. 2020, arXiv:2006.11239, eq. 4)
- `linear`: a = 1 - σ, s = σ = t / num_train_timesteps, t a float (rectified flow: Liu et al. 2022, arXiv:2209.03003;
  Esser et al. 2024, arXiv:2403.03206)
- `cosine`: a = cos φ, s = sin φ, φ = π/2 · t / num_train_timesteps, t a float (Salimans & Ho 2022, arXiv:2202.00512;
  the TrigFlow of Lu & Song 2024, arXiv:2410.11081)

What is predicted of it:

- `epsilon`: the noise ε (Ho et al. 2020, eq. 14)
- `v_prediction`: v = a·ε - s·x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)
- `sample`: the clean latents x_0
- `flow_prediction`: the velocity u = ε - x_0 (Esser et al. 2024, section 2)
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
SIGMA_SCHEDULERS = (EDMDPMSolverMultistepScheduler, CosineDPMSolverMultistepScheduler)
"""Their noise levels σ are those of x_0 + σ·ε, which the model is given divided by sqrt(1 + σ²), where their
`sigma_data` is 1: the path `cosine`, σ = tan φ. Their timesteps are what the model is told of σ."""


def append_dims(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give values the rank of `like`, so that they broadcast over it: of shape (batch,), or with more dimensions of
    `like`, such as (batch, 1, frames, 1, 1)."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def cosine_betas(num_timesteps: int) -> list[float]:
    """`trained_betas` that give a scheduler of diffusers the path `cosine`: ᾱ = cos²φ of each timestep. The first has
    that of 0.5, for samplers take logarithms of its noise, and ask a model at the others."""
    angles = [math.pi / 2 * max(t, 0.5) / num_timesteps for t in range(num_timesteps)]
    alphas_cumprod = [math.cos(angle) ** 2 for angle in angles]
    return [1 - alphas_cumprod[0], *(1 - b / a for a, b in itertools.pairwise(alphas_cumprod))]


def path_of(scheduler_class: type, config: Mapping[str, Any]) -> str:
    """The path of a scheduler of diffusers of this class and config; `cosine` is known by its betas."""
    if issubclass(scheduler_class, FLOW_SCHEDULERS) or config.get("use_flow_sigmas"):
        return "linear"
    if config.get("prediction_type") == "flow_prediction":
        return "linear"
    if issubclass(scheduler_class, SIGMA_SCHEDULERS) and config.get("sigma_data") == 1:
        return "cosine"
    betas = config.get("trained_betas")
    if betas is None or not len(betas):
        return "ddpm"
    expected = torch.tensor(cosine_betas(len(betas)))
    return "cosine" if torch.allclose(torch.as_tensor(betas).float(), expected, rtol=1e-4, atol=1e-7) else "ddpm"


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule that a model is trained with.

    Latents have any rank, (batch, channels, …). Timesteps have the shape (batch,), or any other that broadcasts over
    the latents (`append_dims`): one for each frame, say. They are integers in [0, num_train_timesteps) on the path
    `ddpm`, and floats in [0, num_train_timesteps] on the others, by which all is differentiable there.
    """

    path: Literal["ddpm", "linear", "cosine"]
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
    num_train_timesteps: int = 1000
    alphas_cumprod: torch.Tensor | None = None
    """ᾱ of each timestep, (num_train_timesteps,), of the path `ddpm`."""
    shift: float = 1.0
    """How much the timesteps of the path `linear` are shifted towards noise: see `sample_timesteps`."""
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, scheduler) -> "Schedule":
        """That of a scheduler of diffusers.

        Raises:
            ValueError: it has none of the paths, or predicts none of `PREDICTION_TYPES`.
        """
        config, path = scheduler.config, path_of(type(scheduler), scheduler.config)
        if isinstance(scheduler, FLOW_SCHEDULERS):
            shift = config.get("shift", 1.0)
            return cls("linear", "flow_prediction", config.num_train_timesteps, shift=shift)
        prediction_type = config.get("prediction_type")
        if prediction_type not in PREDICTION_TYPES:
            name, allowed = type(scheduler).__name__, ", ".join(PREDICTION_TYPES)
            raise ValueError(f"{name}: prediction_type must be one of {allowed}, got {prediction_type!r}")
        if path == "linear":
            return cls(path, prediction_type, config.num_train_timesteps, shift=config.get("flow_shift", 1.0))
        if path == "cosine":
            return cls(path, prediction_type, config.num_train_timesteps)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(scheduler).__name__}: it has no alphas_cumprod, and is no flow matching scheduler")
        alphas_cumprod = scheduler.alphas_cumprod.float()  # some have it in float64
        return cls(path, prediction_type, config.num_train_timesteps, alphas_cumprod)

    @property
    def has_continuous_time(self) -> bool:
        """Whether timesteps are floats, not integers."""
        return self.path != "ddpm"

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep of the path `ddpm` is pure noise."""
        return self.path == "ddpm" and self.alphas_cumprod[-1].item() == 0

    def alphas_and_sigmas(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and s of x_t = a·x_0 + s·ε, each of the timesteps' shape."""
        if self.path == "linear":
            sigmas = timesteps / self.num_train_timesteps
            return 1 - sigmas, sigmas
        if self.path == "cosine":
            fractions = timesteps / self.num_train_timesteps
            return torch.sin(math.pi / 2 * (1 - fractions)), torch.sin(math.pi / 2 * fractions)  # cos ends beside 0
        device = timesteps.device
        if device not in self._on_device:
            self._on_device[device] = self.alphas_cumprod.to(device)
        alphas_cumprod = self._on_device[device][timesteps]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The signal-to-noise ratio a² / s², of the timesteps' shape, kept within [1e-8, 1e8] so that it is never 0 or
        infinite."""
        alphas, sigmas = self.alphas_and_sigmas(timesteps)
        return (alphas.square() / sigmas.square().clamp(min=1e-12)).clamp(1e-8, 1e8)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noisy latents x_t = a·latents + s·noise, of the latents' shape."""
        alphas, sigmas = self.alphas_and_sigmas(timesteps)
        return append_dims(alphas, latents) * latents + append_dims(sigmas, latents) * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser has to predict, of the latents' shape."""
        return self._express(latents, noise, timesteps, self.prediction_type)

    def convert(
        self, output: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor, to: str
    ) -> torch.Tensor:
        """The prediction `output` that was made from `noisy_latents` as one of the type `to`, of the latents' shape.

        Solves x_t = a·x_0 + s·ε and the prediction's definition for x_0 and ε. A `sample` prediction says nothing of
        the noise at s = 0, and `epsilon` nothing of the clean latents at a = 0: what is converted is finite there, and
        meaningless.
        """
        if to == self.prediction_type:
            return output
        alphas, sigmas = (append_dims(x, noisy_latents) for x in self.alphas_and_sigmas(timesteps))
        if self.prediction_type == "epsilon":
            noise, latents = output, (noisy_latents - sigmas * output) / alphas.clamp(min=1e-6)
        elif self.prediction_type == "sample":
            noise, latents = (noisy_latents - alphas * output) / sigmas.clamp(min=1e-6), output
        elif self.prediction_type == "flow_prediction":
            norm = 1 if self.path == "linear" else alphas + sigmas
            noise, latents = (noisy_latents + alphas * output) / norm, (noisy_latents - sigmas * output) / norm
        else:
            norm = alphas.square() + sigmas.square() if self.path == "linear" else 1
            noise = (sigmas * noisy_latents + alphas * output) / norm
            latents = (alphas * noisy_latents - sigmas * output) / norm
        return self._express(latents, noise, timesteps, to)

    def error_scale(self, timesteps: torch.Tensor) -> torch.Tensor:
        """c in |output - target|² = c·|x̂_0 - x_0|² at a given x_t = a·x_0 + s·ε, of the timesteps' shape.

        epsilon: SNR; sample: 1; v_prediction: (a²/s + s)², which is SNR + 1 where a² + s² = 1; flow: (a/s + 1)², which
        is (1/σ)² where a + s = 1.
        """
        snr = self.snr(timesteps)
        if self.prediction_type == "sample":
            return torch.ones_like(snr)
        if self.prediction_type == "epsilon":
            return snr
        if self.prediction_type == "flow_prediction":
            return (snr.sqrt() + 1) ** 2
        if self.path != "linear":
            return snr + 1
        alphas, sigmas = self.alphas_and_sigmas(timesteps)
        return ((alphas.square() + sigmas.square()) / sigmas.clamp(min=1e-6)).square()

    def _express(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, prediction_type: str
    ) -> torch.Tensor:
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return latents
        if prediction_type == "flow_prediction":
            return noise - latents
        alphas, sigmas = self.alphas_and_sigmas(timesteps)
        return append_dims(alphas, latents) * noise - append_dims(sigmas, latents) * latents
