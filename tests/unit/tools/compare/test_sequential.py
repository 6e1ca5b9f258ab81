"""Levels of looks against published bounds and against what they promise; and when an experiment gives up."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import special, stats

from moelab_tools.compare.contrast import LEVEL, Contrast
from moelab_tools.compare.pairing import Losses
from moelab_tools.compare.sequential import Plan, levels, obrien_fleming, pocock, prospect
from moelab_tools.compare.verdict import BETTER, NOT_RESOLVED, Rules, judge

MANY = 4000  # pairs a step: there a t statistic is a normal one

# |z| at parts of the information, two-sided 5 %: of gsDesign and ldbounds, as tests of other packages quote them.
PUBLISHED = {
    ("obrien_fleming", (1, 2)): (2.963, 1.969),
    ("obrien_fleming", (1, 2, 3, 4)): (4.333, 2.963, 2.359, 2.014),
    ("obrien_fleming", (2, 4, 9, 10)): (4.877, 3.357, 2.097, 2.054),
    ("pocock", (1, 2)): (2.157, 2.201),
    ("pocock", (1, 2, 3, 4)): (2.368, 2.368, 2.358, 2.350),
    ("pocock", (2, 4, 9, 10)): (2.438, 2.427, 2.224, 2.376),
}


@pytest.mark.parametrize(("spending", "shares"), PUBLISHED)
def test_for_many_pairs_the_levels_are_those_of_the_published_bounds(spending: str, shares: tuple[int, ...]) -> None:
    found = levels(tuple(MANY * share for share in shares), LEVEL, spending)
    bounds = [float(special.ndtri(1 - level / 2)) for level in found]
    assert bounds == pytest.approx(PUBLISHED[spending, shares], abs=2e-3)


def test_one_sided_published_bounds_at_ten_per_cent() -> None:
    """SeqBounds.jl's readme: one-sided 5 % at a quarter, a half, three quarters, all."""
    found = levels(tuple(MANY * share for share in (1, 2, 3, 4)), 0.1)
    bounds = [float(special.ndtri(1 - level / 2)) for level in found]
    assert bounds == pytest.approx((3.74955, 2.53993, 2.01604, 1.72014), abs=2e-3)


def test_all_of_the_error_is_spent_at_the_end_and_the_first_look_spends_just_its_part() -> None:
    for spending in (obrien_fleming, pocock):
        assert spending(0.025, 1.0) == pytest.approx(0.025)
    looks = (3, 5, 8)
    assert levels(looks, LEVEL)[0] == pytest.approx(2 * obrien_fleming(LEVEL / 2, 3 / 8), rel=1e-6)
    assert levels((8,), LEVEL) == (LEVEL,)


@pytest.mark.parametrize("looks", [(3, 5, 8), (4, 5, 6), (3, 4, 9)])
@pytest.mark.parametrize("spending", ["obrien_fleming", "pocock"])
def test_t_statistics_cross_the_levels_in_five_per_cent(looks: tuple[int, ...], spending: str) -> None:
    """Simulated from a seed; five standard errors. The levels of normal statistics are false in 5.2 to 5.6 %."""
    count = 200_000
    values = np.random.default_rng(0).standard_normal((count, looks[-1]))
    crossed = np.zeros(count, bool)
    for pairs, level in zip(looks, levels(looks, LEVEL, spending), strict=True):
        some = values[:, :pairs]
        t = some.mean(1) / some.std(1, ddof=1) * math.sqrt(pairs)
        crossed |= np.abs(t) > stats.t.isf(level / 2, pairs - 1)
    assert crossed.mean() == pytest.approx(LEVEL, abs=5 * math.sqrt(LEVEL * (1 - LEVEL) / count))


def test_levels_grow_with_the_error_so_that_holms_steps_are_in_order() -> None:
    for at in range(3):
        found = [Plan((3, 5, 8), at).level(LEVEL / count) for count in (4, 3, 2, 1)]
        assert all(low < high for low, high in pairwise(found))


def _losses(gaps: list[float]) -> dict[str, Losses]:
    rng = np.random.default_rng(3)
    documents = 40
    text = rng.normal(0, 0.01, (1, documents))
    base = 2 + rng.normal(0, 0.05, (len(gaps), 1)) + rng.normal(0, 0.001, (len(gaps), documents))
    keys = tuple(range(len(gaps)))
    variant = base + np.array(gaps)[:, None] + text
    size = np.full(documents, 100.0)
    return {"base": Losses(keys, base * size, size), "variant": Losses(keys, variant * size, size)}


def test_a_difference_that_five_seeds_alone_resolve_needs_more_at_an_early_look() -> None:
    losses = _losses([-0.031, -0.018, -0.04, -0.012, -0.029])
    alone = judge(losses, "base", Rules(named=True))["variant"]
    early = judge(losses, "base", Rules(named=True, plan=Plan((5, 10), 0)))["variant"]
    late = judge(losses, "base", Rules(named=True, plan=Plan((3, 5), 1)))["variant"]
    assert alone.verdict == late.verdict == BETTER
    assert early.verdict == NOT_RESOLVED
    assert early.high is not None
    assert alone.high is not None
    assert late.high is not None
    assert alone.high < late.high < early.high
    assert "look 1 of 2, at 5, 10 pairs" in early.method
    assert early.level == pytest.approx(Plan((5, 10), 0).level())


def test_another_error_gives_another_interval() -> None:
    losses = _losses([-0.03, -0.02, -0.04, -0.01])
    wide, narrow = (judge(losses, "base", Rules(named=True, error=error))["variant"] for error in (0.01, 0.2))
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low
    assert (wide.verdict, narrow.verdict) == (NOT_RESOLVED, BETTER)


def test_the_prospect_is_the_share_of_repetitions_that_end_with_a_word() -> None:
    """Against draws of the very model: an unknown mean with a flat prior and known-by-t noise."""
    pairs, wanted, level, practical = 5, 10, 0.04, 0.6
    one = Contrast(0.5, 0.3, pairs - 1.0, 0.05, 39.0)
    later = Contrast(0.5, 0.3 * math.sqrt(pairs / wanted), wanted - 1.0, 0.05, 39.0)
    half = later.half(level)
    spread = 0.3 * math.sqrt((wanted - pairs) / wanted)
    means = 0.5 + spread * np.random.default_rng(1).standard_t(pairs - 1, 400_000)
    share = np.mean((np.abs(means) > half) | (np.abs(means) + half <= practical))
    assert prospect(one, pairs, wanted, level, practical) == pytest.approx(share, abs=0.004)


def test_a_prospect_is_small_where_the_noise_is_large_and_one_where_nothing_is_left_open() -> None:
    assert prospect(Contrast(0.01, 1.0, 7.0, 0.0, 9.0), 8, 10, 0.04, 0.1) < 0.01
    assert prospect(Contrast(5.0, 0.01, 2.0, 0.0, 9.0), 3, 8, 0.04, 0.1) > 0.99
    assert prospect(Contrast(0.0, 0.0, 2.0, 0.01, 39.0), 3, 8, 0.04, 0.1) == 1.0, "established as negligible"
