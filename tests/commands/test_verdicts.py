import math

import numpy as np
import pytest
from scipy import stats

from difftrain_utils.commands.verdicts import bootstrap, holm, paired_t, seeds_needed, t_cdf, t_quantile, verdict


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 20, 51])
def test_students_distribution_is_scipys(freedom):
    for t in (-7, -0.3, 0, 0.3, 1.7, 4.4, 30):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for p in (0.5, 0.8, 0.975, 0.9999):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_paired_test_is_scipys(n):
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    found, expected = paired_t(differences.tolist()), stats.ttest_1samp(differences, 0)
    low, high = expected.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    assert paired_t([0.0] * n).p == 1


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 3·, then 2·0.03, 4·
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.slow
def test_so_many_seeds_detect_the_gap():
    """Simulated: of experiments whose gap is the detectable one, four of five find it."""
    random, n = np.random.default_rng(0), seeds_needed(1.0, 1.0)  # sd 1, gap 1
    assert n == 10
    found = sum(paired_t(random.normal(1, 1, n).tolist()).p <= 0.05 for _ in range(3000)) / 3000
    assert found == pytest.approx(0.8, abs=0.05)
    assert seeds_needed(1.0, 1e-6) is None


@pytest.mark.parametrize("settings", [1, pytest.param(11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("looks", [1, 2])
def test_equal_settings_are_told_apart_in_at_most_5_percent(settings, n, looks):
    """Experiments of settings that are all equal, with a baseline in common; an error is any `better` or `worse` at any
    look (after n seeds, and after 2n). Of 1,500 experiments with an error rate of 5 %, more than 6.9 % are in error
    once in 2,000 times."""
    random, errors, experiments = np.random.default_rng(n * settings), 0, 1500
    bound = 0.05 + 3.29 * math.sqrt(0.05 * 0.95 / experiments)
    for _ in range(experiments):
        losses = random.normal(0, 0.1, (settings + 1, n * looks)) + random.normal(
            0, 1, n * looks
        )  # of a seed: all alike
        for look in range(1, looks + 1):
            tested = [paired_t((own - losses[0])[: look * n].tolist()) for own in losses[1:]]
            adjusted = holm([paired.p for paired in tested])
            verdicts = [verdict(*pair, looks) for pair in zip(tested, adjusted, strict=True)]
            if set(verdicts) != {"not distinguishable"}:
                errors += 1
                break
    assert errors / experiments <= bound


def test_the_bootstrap_keeps_seeds_and_images_together():
    random, num_images = np.random.default_rng(1), 12
    images, bins = np.arange(96) % num_images, np.arange(96) % 8
    noise = random.normal(0, 0.3, 96)
    baseline = np.exp(noise + random.normal(0, 0.2, (5, 1)))
    assert bootstrap(0.9 * baseline, baseline, images, bins) == pytest.approx([math.log(0.9)] * 2)
    of_image = random.normal(0, 0.2, num_images)[images]  # an image's effect on the setting: more images, less doubt
    low, high = bootstrap(baseline * np.exp(of_image), baseline, images, bins)
    mean, error = of_image[:num_images].mean(), of_image[:num_images].std() / num_images**0.5
    assert low == pytest.approx(mean - 1.96 * error, abs=0.06) and high == pytest.approx(mean + 1.96 * error, abs=0.06)
