"""The two errors of a difference: closed forms, scipy's own t, and the residual formula written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.contrast import over_groups, over_pairs


def test_without_noise_in_the_text_it_is_the_paired_t_interval() -> None:
    first, second = np.array([1.0, 1.2, 1.1]), np.array([1.05, 1.3, 1.12])
    size = np.array([10.0, 50.0, 7.0])
    found = over_pairs((first - second)[:, None] * size, size)
    exact = stats.ttest_rel(first, second)
    assert found.text_error == pytest.approx(0, abs=1e-9)
    assert found.half() == pytest.approx(exact.confidence_interval().high - found.difference)
    assert found.p_value() == pytest.approx(exact.pvalue, rel=1e-5)


def test_without_noise_in_the_text_groups_give_welchs_interval() -> None:
    first, second = np.array([1.0, 1.2, 1.1, 1.4]), np.array([1.05, 1.3])
    size = np.array([10.0, 50.0, 7.0])
    found = over_groups(first[:, None] * size, second[:, None] * size, size)
    exact = stats.ttest_ind(first, second, equal_var=False)
    assert found.half() == pytest.approx(exact.confidence_interval().high - found.difference)
    assert found.p_value() == pytest.approx(exact.pvalue, rel=1e-5)
    assert found.seed_freedom == pytest.approx(exact.df)


def test_one_pair_with_documents_of_equal_size_is_the_t_interval_over_documents() -> None:
    gap = np.random.default_rng(0).normal(0.1, 1, 12)
    found = over_pairs(8 * gap[None], np.full(12, 8.0))
    exact = stats.ttest_1samp(gap, 0)
    assert found.seed_error == 0
    assert found.half() == pytest.approx(exact.confidence_interval().high - gap.mean())
    assert found.p_value() == pytest.approx(exact.pvalue, rel=1e-5)


def test_the_text_error_leaves_out_what_seeds_do_to_single_documents() -> None:
    """With equal sizes: (variance over documents of the mean gap - residual mean square / n) / m, in loops."""
    seeds, documents = 4, 9
    gap = np.random.default_rng(1).normal(0, 1, (seeds, documents)) + np.linspace(-3, 3, documents)
    found = over_pairs(5 * gap, np.full(documents, 5.0))
    square = sum(
        (gap[s, d] - gap[s].mean() - gap[:, d].mean() + gap.mean()) ** 2 for s in range(seeds) for d in range(documents)
    ) / ((seeds - 1) * (documents - 1))
    expected = (gap.mean(0).var(ddof=1) - square / seeds) / documents
    assert found.text_error == pytest.approx(math.sqrt(expected))


def test_the_text_error_of_one_pair_is_the_jackknifes() -> None:
    generator = np.random.default_rng(2)
    gap, size = generator.normal(0, 1, 7), generator.uniform(1, 20, 7)
    without = [np.delete(gap, d).sum() / np.delete(size, d).sum() for d in range(7)]
    ratio = gap.sum() / size.sum()
    expected = math.sqrt(6 / 7 * sum((one - ratio) ** 2 for one in without))
    assert over_pairs(gap[None], size).text_error == pytest.approx(expected)


def test_it_is_never_narrower_than_the_seeds_alone_and_adds_as_squares() -> None:
    generator = np.random.default_rng(3)
    gap, size = generator.normal(0, 1, (200, 3, 8)), generator.uniform(1, 9, 8)
    found = over_pairs(gap, size)
    assert np.all(found.half() >= found.seed_half())
    assert found.half() ** 2 == pytest.approx(found.seed_half() ** 2 + found.text_half() ** 2)


def test_groups_and_pairs_agree_on_the_difference_and_mirror() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.normal(5, 1, (3, 6)), generator.normal(5, 1, (3, 6))
    size = generator.uniform(1, 9, 6)
    there, back = over_groups(first, second, size), over_groups(second, first, size)
    assert there.difference == pytest.approx(over_pairs(first - second, size).difference)
    assert (back.difference, back.half()) == pytest.approx((-there.difference, there.half()))


def test_the_interval_at_its_p_value_just_reaches_zero() -> None:
    generator = np.random.default_rng(5)
    found = over_pairs(generator.normal(0.3, 1, (20, 4, 9)), generator.uniform(1, 9, 9))
    assert np.abs(found.difference) / found.half(found.p_value()) == pytest.approx(1, rel=1e-4)


def test_a_single_document_and_a_single_pair_have_no_error() -> None:
    found = over_pairs(np.array([[3.0]]), np.array([2.0]))
    assert (found.difference, found.half()) == (1.5, 0.0)


def test_it_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    """Seeds and text both vary; 2000 comparisons of 3 pairs, binomial standard deviation 0.5 %: nominal is 95."""
    generator = np.random.default_rng(6)
    gap = (
        generator.normal(0, 1, (2000, 3, 1))
        + generator.normal(0, 2, (2000, 1, 30))
        + generator.normal(0, 2, (2000, 3, 30))
    )
    found = over_pairs(gap, np.ones(30))
    assert 0.93 <= np.mean(np.abs(found.difference) <= found.half()) <= 0.985
