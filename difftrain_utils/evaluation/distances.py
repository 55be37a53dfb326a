"""How far generated images, clips or sounds are from real ones: functions of the features (N, d) of real and (M, d) of
generated ones, float64, and what can be said with as few images as a small budget has."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from difftrain_utils.keyed_random import generator_for

Distance = Callable[[torch.Tensor, torch.Tensor], float]


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians through two sets of features, N and M at least 2 (Heusel et al. 2017,
    arXiv:1706.08500, equation 6): |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 √(Σ₁Σ₂)).

    Of Σ = RᵀR, by a QR decomposition of the features, tr √(Σ₁Σ₂) is the sum of the singular values of R₁R₂ᵀ: no root
    of a matrix is taken, of which there may be none in float numbers where there are fewer images than features.
    """
    roots = [torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5 for x in (real, generated)]
    of_both = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum(root.square().sum() for root in roots)
    return ((real.mean(0) - generated.mean(0)).square().sum() + spread - 2 * of_both).item()


def unreliable(subject: str, what: str, number: int, width: int) -> str | None:
    """What to say of Fréchet distances of fewer images, clips or sounds than they need for as many features; None of
    enough."""
    if number >= 2 * width:
        return None
    return f"{subject} unreliable: {number} {what} for {width} features; it takes {2 * width}"


def kernel_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """KID: the unbiased estimate of the squared MMD with the kernel (x·y/d + 1)³, N and M at least 2 (Bińkowski et al.
    2018, arXiv:1801.01401, section 4). It is of all images at once: the usual mean over subsets has the same
    expectation and more variance."""
    return _squared_mmd(real, generated, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)


def cmmd(real: torch.Tensor, generated: torch.Tensor) -> float:
    """1000 times the squared MMD of CLIP's embeddings, scaled to length 1, with the kernel exp(-|x - y|²/(2·10²)), N
    and M at least 2 (Jayasumana et al. 2024, arXiv:2401.09603, section 4). It is the unbiased estimate of the paper;
    its code has the biased one, which is larger by about 5·(1/N + 1/M)·E|x - y|²."""
    real, generated = (torch.nn.functional.normalize(x, dim=1) for x in (real, generated))
    return 1000 * _squared_mmd(real, generated, lambda x, y: torch.exp(-torch.cdist(x, y).square() / 200))


def kernel_audio_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """KAD: 100 times the unbiased estimate of the squared MMD with the kernel exp(-|x - y|²/(2σ²)), σ the median of the
    distances between real sounds, N and M at least 2 (Chung et al. 2025, arXiv:2502.15602; factor and median are those
    of their kadtk)."""
    median = torch.pdist(real).median()
    return 100 * _squared_mmd(
        real, generated, lambda x, y: torch.exp(-torch.cdist(x, y).square() / (2 * median.square() + 1e-8))
    )


def _squared_mmd(real: torch.Tensor, generated: torch.Tensor, kernel: Callable) -> float:
    """Unbiased: without the pairs of an image and itself (Gretton et al. 2012, equation 3)."""
    within = sum(
        (of.sum() - of.trace()) / (len(of) * (len(of) - 1)) for of in (kernel(x, x) for x in (real, generated))
    )
    return (within - 2 * kernel(real, generated).mean()).item()


class Neighbours(NamedTuple):
    """Shares from 0 to 1, but for density, which can be above."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: torch.Tensor, generated: torch.Tensor) -> Neighbours:
    """By the distance of each image to its k-th neighbour in its own set, its radius; N and M above k.

    precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991; k = 3): the share of the generated images within
    the radius of a real one, and of real ones within that of a generated one. density and coverage (Naeem et al. 2020,
    arXiv:2002.09797; k = 5): within how many real ones' radii a generated image is, over k, on average; and the share
    of the real ones within whose radius there is a generated one. A single odd real image, whose radius is large, can
    make precision 1, and not density.
    """
    between = torch.cdist(real, generated)
    precise = between <= _radii(real, 3)[:, None]
    recalled = between <= _radii(generated, 3)[None, :]
    dense = between <= _radii(real, 5)[:, None]
    shares = precise.any(0), recalled.any(1), dense.double().sum(0) / 5, dense.any(1)
    return Neighbours(*(share.double().mean().item() for share in shares))


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """The distance to the k-th nearest other one."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values  # the nearest is itself


# ── What few images say ──────────────────────────────────────────────────────────────────────────────────────
def over_halves(distance: Distance, real: torch.Tensor, generated: torch.Tensor, draws: int = 20) -> list[float]:
    """The distance between random halves of the two sets. Their standard deviation is the standard error of the
    distance between the whole sets (the delete-half jackknife, Shao and Wu 1989): drawing half without
    replacement varies as much as drawing all again, and no image is there twice, as in a bootstrap, and so its own
    nearest neighbour. That of FID and KID is up to about twice too large where the sets are close (docs/metrics.md)."""
    found = []
    for draw in range(draws):
        random = generator_for(0, "halves", draw)
        halves = [x[torch.from_numpy(random.permutation(len(x))[: len(x) // 2])] for x in (real, generated)]
        found.append(distance(*halves))
    return found


def at_infinity(of_all: float, of_halves: list[float]) -> float:
    """What a distance would be between infinitely many images, if its bias falls as 1/N: twice that of all images less
    the mean over halves (Chong and Forsyth 2020, arXiv:1911.07023, who fit a line to more sizes)."""
    return 2 * of_all - sum(of_halves) / len(of_halves)
