"""Noisy latents, and what the denoiser has to predict from them.

Every schedule mixes x_t = a·x_0 + s·ε. Where the prediction type is `flow_prediction` (rectified flow, Liu et al.
2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206), a = 1 - σ and s = σ = t / num_train_timesteps, t a float.
Otherwise a = sqrt(ᾱ_t) and s = sqrt(1 - ᾱ_t), t an integer (Ho et al. 2020, arXiv:2006.11239, eq. 4).
Latents of any rank work: (batch, channels, …) for audio, images and video.
"""

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def append_dims(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give per-sample values of shape (batch,) the rank of `like`, so that they broadcast over it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def get_prediction_type(noise_scheduler) -> str:
    """What a model trained with this scheduler predicts; diffusers' flow matching schedulers do not say.

    Raises:
        ValueError: it is none of `PREDICTION_TYPES`.
    """
    prediction_type = getattr(noise_scheduler.config, "prediction_type", "flow_prediction")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    return prediction_type


def alphas_and_sigmas(noise_scheduler, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a and s of x_t = a·x_0 + s·ε, each of the timesteps' shape (batch,).

    `timesteps`: integers in [0, num_train_timesteps), or floats in [0, num_train_timesteps] for flow_prediction.
    """
    if get_prediction_type(noise_scheduler) == "flow_prediction":
        sigmas = timesteps / noise_scheduler.config.num_train_timesteps
        return 1 - sigmas, sigmas
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def compute_snr(noise_scheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """The signal-to-noise ratio a² / s², shape (batch,), kept within [1e-8, 1e8] so that it is never 0 or infinite."""
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
    return (alphas.square() / sigmas.square().clamp(min=1e-12)).clamp(1e-8, 1e8)


def add_noise(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The noisy latents x_t = a·latents + s·noise, of the latents' shape (batch, channels, …)."""
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
    return append_dims(alphas, latents) * latents + append_dims(sigmas, latents) * noise


def get_target(noise_scheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the denoiser has to predict, by the scheduler's prediction type; of the latents' shape.

    - `epsilon`: the noise ε (Ho et al. 2020, eq. 14)
    - `v_prediction`: v = a·ε - s·x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D)
    - `sample`: the clean latents x_0
    - `flow_prediction`: the velocity u = ε - x_0 (Esser et al. 2024, section 2)

    Raises:
        ValueError: another prediction type.
    """
    prediction_type = get_prediction_type(noise_scheduler)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "flow_prediction":
        return noise - latents
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
    return append_dims(alphas, latents) * noise - append_dims(sigmas, latents) * latents


def get_predicted_noise(
    noise_scheduler, noisy_latents: torch.Tensor, model_pred: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The noise ε that a prediction of any type stands for, given the noisy latents that it was made from.

    Solves x_t = a·x_0 + s·ε and the prediction's definition for ε. A `sample` prediction says nothing of the noise at
    s = 0: there the noise comes out finite, and meaningless.
    """
    prediction_type = get_prediction_type(noise_scheduler)
    alphas, sigmas = (append_dims(x, noisy_latents) for x in alphas_and_sigmas(noise_scheduler, timesteps))
    if prediction_type == "epsilon":
        return model_pred
    if prediction_type == "sample":
        return (noisy_latents - alphas * model_pred) / sigmas.clamp(min=1e-6)
    if prediction_type == "flow_prediction":
        return noisy_latents + alphas * model_pred
    return sigmas * noisy_latents + alphas * model_pred
