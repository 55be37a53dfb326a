"""DREAM: train on the inputs that the model's own errors lead to (Zhou et al. 2023, arXiv:2312.00210)."""

from collections.abc import Callable

import torch

from difftrain_utils.objective.schedule import add_noise, alphas_and_sigmas, append_dims, get_predicted_noise


@torch.no_grad()
def rectify_noise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise_scheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    detail_preservation: float,
) -> torch.Tensor:
    """The noise ε + λ(ε - ε̂) to train with instead of ε, of the latents' shape (batch, channels, …).

    ε̂ is the noise that `predict(noisy_latents, timesteps)` stands for, in one pass without gradients, and
    λ = (s / sqrt(a² + s²))^p with p = `detail_preservation` ≥ 0 (s^p where a² + s² = 1, as in the paper). With the new
    noise, `add_noise` gives the paper's input and `get_target` its target, for every prediction type: with Δ = λ(ε - ε̂)
    they are x_t + sΔ and ε + Δ, v + aΔ, u + Δ, or x_0 as it was.
    """
    noisy_latents = add_noise(noise_scheduler, latents, noise, timesteps)
    model_pred = predict(noisy_latents, timesteps)
    predicted_noise = get_predicted_noise(noise_scheduler, noisy_latents, model_pred, timesteps)
    alphas, sigmas = alphas_and_sigmas(noise_scheduler, timesteps)
    dream_lambda = (sigmas / (alphas.square() + sigmas.square()).sqrt()) ** detail_preservation
    return noise + append_dims(dream_lambda, noise) * (noise - predicted_noise)
