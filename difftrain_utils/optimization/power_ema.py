"""Power-function averages of the weights, of which any width can be had after the run (EDM2).

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3
and appendix C. The average at step T weighs the weights θ(t) of step t by the profile

    p(t) = (γ+1) t^γ / T^(γ+1),  0 ≤ t ≤ T,

whose width σ_rel is its standard deviation as a fraction of T: unlike with a constant decay, it is the same share of
the run at every step. Averages of two or more widths are stored now and then; since an average is linear in its
profile, one of any other width is the combination of the stored ones whose profiles add up to its own.
`difftrain posthoc-ema` makes it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from difftrain_utils.files import new_file

MAX_SIGMA_REL = 0.28  # γ = 0, the plain mean of all steps, has 0.289


def gamma_of(sigma_rel: float) -> float:
    """γ of the width σ_rel: the positive root of γ³ + 7γ² + (16 - σ_rel⁻²)γ + (12 - σ_rel⁻²)."""
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f"sigma_rel must be above 0 and at most {MAX_SIGMA_REL}, got {sigma_rel}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The width of γ: σ_rel = √(γ+1) / ((γ+2) √(γ+3))."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def decay(step: int, gamma: float) -> float:
    """β of step t ≥ 1 in θ̂ ← β θ̂ + (1-β) θ: β = (1 - 1/t)^(γ+1).

    It makes θ_t's weight in the average of step T the integral of the profile from t-1 to t: (1-β_t) β_{t+1} … β_T =
    (t^(γ+1) - (t-1)^(γ+1)) / T^(γ+1). So combining averages is exactly combining profiles.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    return (1 - 1 / step) ** (gamma + 1)


def profile_product(gamma_a, step_a, gamma_b, step_b):
    """∫ p_a p_b dt, for numbers or for arrays that broadcast.

    Where a ends first, the integral ends at T_a, and T_a^(γ_a+γ_b+1) / (T_a^(γ_a+1) T_b^(γ_b+1)) = (T_a/T_b)^γ_b / T_b:
    the exponent is that of the profile that ends later.

        ∫ p_a p_b dt = (γ_a+1)(γ_b+1) / (γ_a+γ_b+1) · (T_a/T_b)^γ_b / T_b
    """
    earlier, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    gamma_later = np.where(np.less(step_a, step_b), gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** gamma_later / later


def reconstruction_weights(
    snapshot_gammas_and_steps: Sequence[tuple[float, int]], target_gamma: float, target_step: int
) -> list[float]:
    """The x for which Σ x_i p_i is nearest to the target's profile p: A x = b, A_ij = ∫ p_i p_j, b_i = ∫ p_i p.

    Their sum is 1 only as far as the fit is good. Divide by it before use, as EDM2's own code does: else a bad fit
    scales the whole network.
    """
    products, with_target, norms = _normalized_products(snapshot_gammas_and_steps, target_gamma, target_step)
    # lstsq, not solve: snapshots that are nearly the same share a weight, instead of having large opposite ones.
    return (np.linalg.lstsq(products, with_target, rcond=None)[0] / norms).tolist()


def relative_residual(
    snapshot_gammas_and_steps: Sequence[tuple[float, int]],
    weights: Sequence[float],
    target_gamma: float,
    target_step: int,
) -> float:
    """‖p - Σ x_i p_i‖ / ‖p‖: the part of the target's profile that the weights x do not give; 0 is a perfect fit."""
    products, with_target, norms = _normalized_products(snapshot_gammas_and_steps, target_gamma, target_step)
    y = np.asarray(weights) * norms
    return float(max(0.0, 1 - 2 * with_target @ y + y @ products @ y)) ** 0.5


def _normalized_products(snapshots, target_gamma, target_step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A_ij / (‖p_i‖ ‖p_j‖), b_i / (‖p_i‖ ‖p‖), ‖p_i‖ / ‖p‖), in float64: norms differ with the step, by magnitudes."""
    gammas, steps = np.array(snapshots, dtype=np.float64).T
    norms = profile_product(gammas, steps, gammas, steps) ** 0.5
    target_norm = profile_product(target_gamma, target_step, target_gamma, target_step) ** 0.5
    products = profile_product(gammas[:, None], steps[:, None], gammas[None, :], steps[None, :])
    with_target = profile_product(gammas, steps, target_gamma, target_step)
    return products / norms[:, None] / norms, with_target / norms / target_norm, norms / target_norm


class PowerEMA:
    """An average of the parameters for each width in `sigma_rels`, as float32 tensors beside the parameters.

    Widths have at most three decimals, because names of files have three. What the averages are before step 1 does not
    matter: its decay is 0. As in every float32 average, differences to the parameters below about 3e-8 / (1-β) of
    their size are lost to rounding: 1e-4 after 20,000 steps for σ_rel 0.1.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], sigma_rels: Sequence[float]):
        self.sigma_rels = list(sigma_rels)
        self.gammas = [gamma_of(sigma_rel) for sigma_rel in self.sigma_rels]
        if any(round(sigma_rel, 3) != sigma_rel for sigma_rel in self.sigma_rels):
            raise ValueError(f"each sigma_rel must have at most three decimals, got {self.sigma_rels}")
        if len(set(self.sigma_rels)) < max(1, len(self.sigma_rels)):
            raise ValueError(f"sigma_rels must be one or more different widths, got {self.sigma_rels}")
        parameters = list(parameters)
        self.averages = [[p.detach().to(torch.float32, copy=True) for p in parameters] for _ in self.sigma_rels]

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor], global_step: int) -> None:
        """Take in the parameters after optimizer step `global_step`, counted from 1."""
        parameters = [p.detach().float() for p in parameters]
        for gamma, averages in zip(self.gammas, self.averages, strict=True):
            torch._foreach_lerp_(averages, parameters, 1 - decay(global_step, gamma))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The averages themselves, not copies, for a checkpoint: width and position, e.g. "0.050/12"."""
        return {
            f"{sigma_rel:.3f}/{i}": average
            for sigma_rel, averages in self.by_width.items()
            for i, average in enumerate(averages)
        }

    @property
    def by_width(self) -> dict[float, list[torch.Tensor]]:
        """The averages of each width, beside the parameters."""
        return dict(zip(self.sigma_rels, self.averages, strict=True))


def save_snapshot(folder: Path, global_step: int, sigma_rel: float, averages: Mapping[str, torch.Tensor]) -> None:
    """Write `folder/step-000500-0.050.safetensors`, the averages of a width by the parameters' names in the denoiser's
    state dict: whole or not at all. Save before the checkpoint of the same step, so that a run which resumes from it
    has all earlier snapshots.
    """
    path = folder / f"step-{global_step:06d}-{sigma_rel:.3f}.safetensors"
    tensors = {name: average.contiguous() for name, average in averages.items()}
    with new_file(path) as partial:
        of = json.dumps({"sigma_rel": sigma_rel, "step": global_step})
        save_file(tensors, partial, {"ema_snapshot": of})  # of several entries the order would be any
