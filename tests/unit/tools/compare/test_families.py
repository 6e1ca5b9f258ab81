"""Several verdicts at once: Holm by hand, Dunnett and Tukey by scipy, moderated t by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.contrast import LEVEL, over_pairs
from moelab_tools.compare.families import all_pairs_level, baseline_level, dunnett, holm, moderated, tukey


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_one_comparison_needs_no_correction() -> None:
    assert baseline_level(1, 2.0) == all_pairs_level(2, 2.0) == LEVEL
    assert dunnett(1, 4.0) == pytest.approx(stats.t.ppf(0.975, 4), rel=1e-4)
    assert tukey(2, 4.0) == pytest.approx(stats.t.ppf(0.975, 4), rel=1e-4)


@pytest.mark.parametrize(("comparisons", "seeds"), [(2, 4), (5, 3), (4, 8)])
def test_with_pooled_noise_it_is_scipys_dunnett(comparisons: int, seeds: int) -> None:
    """scipy integrates at random, so its p value at our constant is 0.05 within a thousandth or two."""
    generator = np.random.default_rng(0)
    samples = generator.normal(0, 1, (comparisons + 1, seeds))
    freedom = (comparisons + 1) * (seeds - 1)
    noise = np.sqrt(samples.var(1, ddof=1).mean())
    wanted = dunnett(comparisons, float(freedom), pooled=True) * noise * np.sqrt(2 / seeds)
    samples[1] += samples[0].mean() + wanted - samples[1].mean()  # its t is now the constant
    found = stats.dunnett(*samples[1:], control=samples[0], rng=np.random.default_rng(1))
    assert found.pvalue[0] == pytest.approx(0.05, abs=0.003)


def test_tukeys_constant_is_scipys() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0, 1, (4, 5))
    noise = np.sqrt(samples.var(1, ddof=1).mean())
    samples[1] += samples[0].mean() + tukey(4, 16.0) * noise * np.sqrt(2 / 5) - samples[1].mean()
    assert stats.tukey_hsd(*samples).pvalue[0, 1] == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(("comparisons", "seeds"), [(3, 3), (5, 5)])
def test_each_with_its_own_noise_dunnetts_constant_holds_by_simulation(comparisons: int, seeds: int) -> None:
    """40,000 families: standard deviation 0.11 %. Noises share a baseline and are alike: the safe side."""
    draws = np.random.default_rng(1).normal(0, 1, (40_000, comparisons + 1, seeds))
    gap = draws[:, 1:] - draws[:, :1]
    t = np.abs(gap.mean(2)) / (gap.std(2, ddof=1) / np.sqrt(seeds))
    own = np.mean(t.max(1) > dunnett(comparisons, seeds - 1.0))
    textbook = np.mean(t.max(1) > dunnett(comparisons, seeds - 1.0, pooled=True))
    assert 0.042 <= own <= 0.053
    assert textbook > 0.055


def test_own_noise_lies_between_the_textbooks_constant_and_sidaks() -> None:
    for comparisons in (2, 5, 9, 19):
        for freedom in (2.0, 4.0, 7.0):
            sidak = stats.t.isf((1 - 0.95 ** (1 / comparisons)) / 2, freedom)
            assert dunnett(comparisons, freedom, pooled=True) < dunnett(comparisons, freedom) < sidak


def test_all_pairs_hold_together_by_simulation() -> None:
    draws = np.random.default_rng(2).normal(0, 1, (20_000, 4, 3))
    level, t = all_pairs_level(4, 2.0), []
    for i in range(4):
        for j in range(i):
            gap = draws[:, i] - draws[:, j]
            t.append(np.abs(gap.mean(1)) / (gap.std(1, ddof=1) / np.sqrt(3)))
    outside = np.mean(np.max(t, axis=0) > stats.t.isf(level / 2, 2))
    assert 0.042 <= outside <= 0.053


def test_the_moderated_error_is_the_weighted_mean_of_own_and_pooled_squares() -> None:
    generator = np.random.default_rng(3)
    scores = generator.normal(0, 1, (4, 3))  # of a baseline and three variants, three seeds
    size = np.array([2.0, 6.0])
    gaps = scores[1:] - scores[0]
    found, freedom = moderated(gaps, [over_pairs(gap[:, None] * size, size) for gap in gaps])
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    pooled = 2 * (rest**2).sum() / 6
    for one, gap in zip(found, gaps, strict=True):
        assert one.seed_error**2 == pytest.approx((2 * pooled + 2 * gap.var(ddof=1)) / 4 / 3)
    assert freedom == 4.0


def test_moderation_changes_neither_the_difference_nor_the_text() -> None:
    generator = np.random.default_rng(4)
    gaps, size = generator.normal(0, 1, (2, 2, 9)), generator.uniform(1, 5, 9)
    alone = [over_pairs(gap, size) for gap in gaps]
    for one, known in zip(moderated(gaps.sum(-1) / size.sum(), alone)[0], alone, strict=True):
        assert (one.difference, one.text_error) == (pytest.approx(known.difference), known.text_error)
