"""The intervals: closed forms, scipy as reference, and how often they cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.statistics import over_documents, over_seeds


def test_a_constant_difference_per_byte_has_an_interval_of_no_width() -> None:
    size = np.array([10.0, 200.0, 35.0])
    baseline = np.array([7.0, 90.0, 11.0])
    found = over_documents(baseline + 0.25 * size, baseline, size)
    assert (found.difference, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.verdict == "worse"


def test_identical_runs_are_not_resolved() -> None:
    same = np.array([1.0, 2.0, 3.0])
    found = over_documents(same, same, np.ones(3))
    assert (found.difference, found.verdict) == (0, "not resolved")


def test_swapping_the_runs_mirrors_the_interval() -> None:
    generator = np.random.default_rng(0)
    first, second, size = generator.random(40), generator.random(40), generator.random(40) + 1
    there, back = over_documents(first, second, size), over_documents(second, first, size)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))


def test_the_interval_is_the_same_every_time() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.random(40), generator.random(40)
    assert over_documents(first, second, np.ones(40)) == over_documents(first, second, np.ones(40))


def test_pairing_cancels_the_difficulty_of_documents() -> None:
    """Documents differ a hundred times more than the runs do; the sign is still found."""
    generator = np.random.default_rng(0)
    baseline = generator.normal(0, 1, 50)
    found = over_documents(baseline - 0.01 + generator.normal(0, 0.01, 50), baseline, np.ones(50))
    assert found.verdict == "better"


@pytest.mark.parametrize("documents", [8, 60])
def test_with_equal_sizes_it_agrees_with_the_t_interval(documents: int) -> None:
    """Plain percentiles of 8 documents would be a quarter too narrow."""
    gap = np.random.default_rng(1).normal(0.1, 1, documents)
    found = over_documents(gap, np.zeros(documents), np.ones(documents))
    exact = stats.ttest_1samp(gap, 0).confidence_interval()
    width = exact.high - exact.low
    assert found.high - found.low == pytest.approx(width, rel=0.08)  # the bootstrap follows the sample's own skew
    assert found.low == pytest.approx(exact.low, abs=0.08 * width)


def test_it_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    """12 documents, where plain percentiles cover 90 %: 150 trials, binomial standard deviation 1.8 %."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(150):
        size = generator.integers(50, 500, 12).astype(float)
        found = over_documents(size * generator.normal(0.3, 1, 12), np.zeros(12), size)
        hits += found.low <= 0.3 <= found.high
    assert 0.905 <= hits / 150 <= 0.99


def test_over_paired_seeds_it_is_the_paired_t_interval() -> None:
    first, second = [1.0, 1.2, 1.1], [1.05, 1.3, 1.12]
    found = over_seeds(first, second, paired=True)
    exact = stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.covers == "training seeds"


def test_over_different_seeds_it_is_welchs_interval() -> None:
    first, second = [1.0, 1.2, 1.1, 1.4], [1.05, 1.3]
    found = over_seeds(first, second, paired=False)
    exact = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_seeds_that_all_agree_have_no_width() -> None:
    found = over_seeds([1.0, 1.0], [2.0, 2.0], paired=False)
    assert (found.low, found.high, found.verdict) == (-1, -1, "better")
