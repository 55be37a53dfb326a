"""What seeds can tell of two settings: paired differences, Student's t, Holm's correction, and a bootstrap.

A difference is that of one seed, of the logarithms of two losses; runs of one seed share their data, order and noise,
so that most of what varies between seeds cancels.
"""

import bisect
import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.05, 0.8  # the share of null experiments that may find a difference; and of real ones that shall
RESAMPLES = 2000


@dataclass
class Paired:
    """Of the differences of n seeds: mean and standard deviation, 95 % t interval, two-sided p."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def paired_t(differences: Sequence[float]) -> Paired:
    """Student's test of the mean of paired differences, of which there are at least two (Student 1908).

    Without any spread p is 1 if the mean is 0, else 0."""
    n, mean, sd = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    error, freedom = sd / math.sqrt(n), n - 1
    reach = t_quantile(1 - LEVEL / 2, freedom) * error
    p = 2 * (1 - t_cdf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Paired(n, mean, sd, mean - reach, mean + reach, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, so that calling all that are at most 0.05 errs at all in at most 5 % of experiments (Holm
    1979, "A simple sequentially rejective multiple test procedure"), whatever the tests have in common."""
    order, adjusted, largest = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The mean that n seeds whose differences spread by `sd` find at a p of `level` in `POWER` of cases, nearly."""
    return (t_quantile(1 - level / 2, n - 1) + t_quantile(POWER, n - 1)) * sd / math.sqrt(n)


def seeds_needed(sd: float, gap: float, level: float = LEVEL) -> int | None:
    """How many seeds detect a mean of `gap`; None: more than 1000."""
    numbers = range(2, 1001)
    place = bisect.bisect_left(numbers, True, key=lambda n: detectable(sd, n, level) <= abs(gap))
    return numbers[place] if place < len(numbers) else None


def deviation_interval(sd: float, n: int) -> tuple[float, float]:
    """A 95 % interval of the standard deviation of a normal distribution of which n values, two or more, spread by
    `sd`."""

    def quantile(tail: float) -> float:
        low, high = 0.0, 1.0
        while chi2_tail(high, n - 1) > tail:
            high *= 2
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if chi2_tail(middle, n - 1) > tail else (low, middle)
        return (low + high) / 2

    return sd * math.sqrt((n - 1) / quantile(LEVEL / 2)), sd * math.sqrt((n - 1) / quantile(1 - LEVEL / 2))


def chi2_tail(x: float, freedom: int) -> float:
    """The probability of more than x under the χ² distribution (Abramowitz and Stegun 1964, 26.4.4 and 26.4.5)."""
    odd = freedom % 2
    total = math.erfc(math.sqrt(x / 2)) if odd else 0.0
    term = math.exp(-x / 2) * (math.sqrt(2 * x / math.pi) if odd else 1.0)
    for i in range(freedom // 2):
        total += term
        term *= x / (2 * i + 2 + odd)
    return total


def t_cdf(t: float, freedom: int) -> float:
    """Student's distribution function, for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle, cosine = math.atan(t / math.sqrt(freedom)), 1 / math.sqrt(1 + t * t / freedom)
    odd, term, total = freedom % 2, 1.0, 0.0
    for i in range(freedom // 2):  # 1 + c²·1/2 + c⁴·1·3/(2·4) + …, or for odd ones c + c³·2/3 + c⁵·2·4/(3·5) + …
        if i:
            term *= cosine**2 * (2 * i - 1 + odd) / (2 * i + odd)
        total += term
    sine = math.sin(angle)
    inside = 2 / math.pi * (angle + sine * cosine * total) if odd else sine * total
    return 0.5 + inside / 2


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """The inverse of `t_cdf`, for p in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def log_ratios(losses: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Of each noise level. Raises ValueError unless there are the same levels, and all losses finite and above 0."""
    if not losses or not baseline:
        raise ValueError("no validation loss")
    if len(losses) != len(baseline):
        raise ValueError(f"losses of {len(losses)} noise levels, and the baseline's of {len(baseline)}")
    if not all(math.isfinite(value) and value > 0 for value in (*losses, *baseline)):
        raise ValueError("a loss is not a finite number above 0")
    return [math.log(a / b) for a, b in zip(losses, baseline, strict=True)]


def bootstrap(losses: np.ndarray, baseline: np.ndarray, images: np.ndarray, bins: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the mean log ratio over noise levels, from drawing both the seeds and the validation images
    again (with replacement; a seed's and an image's losses stay together, as in Owen 2007, "The pigeonhole bootstrap").

    losses, baseline: of each seed and triple, (seeds, triples); images, bins: of each triple, (triples,).
    """
    random, num_images, num_bins = np.random.default_rng(0), images.max() + 1, bins.max() + 1
    places = images.astype(np.int64) * num_bins + bins
    counts = np.bincount(places, minlength=num_images * num_bins).reshape(num_images, num_bins)
    drawn_images = random.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES).astype(float)
    drawn_seeds = random.multinomial(len(losses), np.full(len(losses), 1 / len(losses)), RESAMPLES) / len(losses)
    drawn_counts, ratios = drawn_images @ counts, []
    for own, other in zip(losses, baseline, strict=True):
        sums = [np.bincount(places, of, num_images * num_bins).reshape(counts.shape) for of in (own, other)]
        with np.errstate(divide="ignore", invalid="ignore"):  # a noise level of which nothing was drawn
            means = [drawn_images @ of / drawn_counts for of in sums]
            ratios.append(np.nanmean(np.log(means[0] / means[1]), axis=1))
    found = (np.stack(ratios, 1) * drawn_seeds).sum(1)
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def verdict(paired: Paired, adjusted_p: float, looks: int = 1) -> str:
    """`better`, `worse` or `not distinguishable`; each of `looks` times at which one looks has its share of the 5 %."""
    if adjusted_p > LEVEL / looks:
        return "not distinguishable"
    return "better" if paired.mean < 0 else "worse"
