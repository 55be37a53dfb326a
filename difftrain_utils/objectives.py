"""Noisy latents, and what the denoiser has to predict from them.

x_t = a·x_0 + s·ε with a = sqrt(ᾱ_t) and s = sqrt(1 - ᾱ_t), a² + s² = 1 (Ho et al. 2020, arXiv:2006.11239,
eq. 4). Latents of any rank work: (batch, channels, …) for audio, images and video.
"""

import torch


def append_dims(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give per-sample values of shape (batch,) the rank of `like`, so that they broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def alphas_and_sigmas(noise_scheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and s of x_t = a·x_0 + s·ε, each of shape (batch,).

    `timesteps`: integers of shape (batch,) in [0, num_train_timesteps).
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def add_noise(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The noisy latents x_t = a·latents + s·noise, of the latents' shape (batch, channels, …)."""
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
    return append_dims(alphas, latents) * latents + append_dims(sigmas, latents) * noise


def get_target(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the denoiser has to predict, by `noise_scheduler.config.prediction_type`; the latents' shape.

    - `epsilon`: the noise ε (Ho et al. 2020, eq. 14)
    - `v_prediction`: v = a·ε - s·x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)
    - `sample`: the clean latents x_0

    Raises:
        ValueError: another prediction type.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
        return append_dims(alphas, latents) * noise - append_dims(sigmas, latents) * latents
    if prediction_type == "sample":
        return latents
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
