"""What a comparison could have seen: the noncentral t, and a seeded simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.contrast import Contrast, over_pairs
from moelab_tools.compare.power import POWER, detectable, power, seeds_needed, text_limit, with_pairs


def known(seed_error: float, seeds: int, text_error: float = 0.0) -> Contrast:
    return Contrast(0.0, seed_error, seeds - 1.0, text_error, 50.0)


@pytest.mark.parametrize(("seeds", "difference"), [(3, 2.0), (3, 8.0), (5, 3.0), (20, 2.5)])
def test_without_text_it_is_the_noncentral_t(seeds: int, difference: float) -> None:
    exact = stats.nct.sf(stats.t.ppf(0.975, seeds - 1), seeds - 1, difference / 0.7)
    assert power(difference, known(0.7, seeds)) == pytest.approx(exact, abs=2e-4)


def test_with_text_alone_it_is_the_normal_beyond_the_interval() -> None:
    exact = stats.norm.sf(stats.t.ppf(0.975, 50) - 3.0)
    assert power(0.3, known(0.0, 3, 0.1)) == pytest.approx(exact, abs=1e-6)


def test_the_detectable_difference_has_the_power_that_is_claimed() -> None:
    for contrast in (known(0.5, 3), known(0.5, 8, 0.2), known(0.01, 3, 0.2)):
        assert power(detectable(contrast, 0.01), contrast, 0.01) == pytest.approx(POWER, abs=1e-6)


def test_a_planted_difference_is_found_as_often_as_stated() -> None:
    """4000 comparisons with seed and text noise; binomial standard deviation 0.7 %."""
    generator, seeds, documents = np.random.default_rng(0), 4, 40
    gap = generator.normal(0, 1, (4000, seeds, 1)) + generator.normal(0, 3, (4000, 1, documents))
    truth = Contrast(0.0, 1 / math.sqrt(seeds), seeds - 1.0, 3 / math.sqrt(documents), documents - 1.0)
    planted = detectable(truth)
    found = over_pairs(gap + planted, np.ones(documents))
    assert np.mean(found.difference > found.half()) == pytest.approx(POWER, abs=0.03)


def test_the_seeds_needed_are_the_fewest_that_suffice() -> None:
    contrast = known(1.0, 3)
    wanted = seeds_needed(1.5, contrast, 3)
    assert wanted is not None
    assert power(1.5, with_pairs(contrast, 3, wanted)) >= POWER > power(1.5, with_pairs(contrast, 3, wanted - 1))


def test_when_the_text_is_the_limit_no_number_of_seeds_is_proposed() -> None:
    assert seeds_needed(0.1, known(0.01, 3, 0.1), 3) is None


def test_endless_seeds_leave_what_the_text_leaves_open() -> None:
    """`text_limit` is where the power of very many pairs reaches POWER, and no number of pairs sees less."""
    contrast = Contrast(0.0, 0.01, 2.0, 0.004, 60.0)
    limit = text_limit(contrast)
    assert power(limit, with_pairs(contrast, 3, 10**7)) == pytest.approx(POWER, abs=1e-3)
    assert detectable(contrast) > detectable(with_pairs(contrast, 3, 200)) > limit
    assert seeds_needed(0.95 * limit, contrast, 3) is None
