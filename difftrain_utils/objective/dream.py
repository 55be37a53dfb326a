"""DREAM: train on the inputs that the model's own errors lead to (Zhou et al. 2023, arXiv:2312.00210)."""

from collections.abc import Callable, Sequence

import torch

from difftrain_utils.config.objective import StrategyConfig
from difftrain_utils.devices import to_device
from difftrain_utils.keyed_random import keyed_rand
from difftrain_utils.objective.schedule import Schedule, append_dims


@torch.no_grad()
def dream_noise(
    config: StrategyConfig,
    schedule: Schedule,
    denoiser: torch.nn.Module,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    seed: int,
    keys: Sequence[int],
) -> torch.Tensor:
    """The noise to train with instead of ε, of the latents' shape (batch, channels, …): ε + λ(ε - ε̂) for the share
    `dream_probability` of the samples `keys`, and ε for the others.

    ε̂ is the noise that `predict(noisy_latents, timesteps)` stands for, in one pass of the `denoiser` without gradients
    and in eval mode, as a sampler sees it. λ = (s / sqrt(a² + s²))^p with p = `dream_detail_preservation` ≥ 0 (s^p
    where a² + s² = 1, as in the paper). With the new noise, `schedule.add_noise` gives the paper's input and
    `schedule.target` its target, for every prediction type: with Δ = λ(ε - ε̂) they are x_t + sΔ and ε + Δ, v + aΔ, u +
    Δ, or x_0 as it was."""
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    denoiser.eval()
    output = predict(noisy_latents, timesteps)
    denoiser.train()
    predicted_noise = schedule.convert(output, noisy_latents, timesteps, "epsilon")
    alphas, sigmas = schedule.alphas_and_sigmas(timesteps)
    dream_lambda = (sigmas / (alphas.square() + sigmas.square()).sqrt()) ** config.dream_detail_preservation
    rectified = noise + append_dims(dream_lambda, noise) * (noise - predicted_noise)
    chosen = to_device(keyed_rand(seed, "dream", keys) < config.dream_probability, noise.device)
    return torch.where(append_dims(chosen, noise), rectified, noise)
