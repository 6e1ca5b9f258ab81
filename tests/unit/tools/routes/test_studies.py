"""The studies find what is planted, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from moelab_tools.routes.alternatives_study import SAMPLES, _rows
from moelab_tools.routes.intervals import corrected, estimates


def _losses(better: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(own [T], others [SAMPLES, T], document [T]): a token's difficulty, and luck that each route has anew."""
    chance = np.random.default_rng(0)
    tokens = 40_000
    difficulty = chance.exponential(1.0, tokens)
    own = difficulty * np.exp(0.5 * chance.standard_normal(tokens) - better)
    others = difficulty * np.exp(0.5 * chance.standard_normal((SAMPLES, tokens)))
    return own, others, np.arange(tokens) % 50


def test_a_router_that_knows_nothing_looks_bad_on_fragile_tokens_only_where_it_picked_them_itself():
    own, others, document = _losses(0.0)
    half = SAMPLES // 2
    flattered = {row.name.split(",")[0]: row for row in _rows(np.exp(-own), own, others, document)}
    fair = {row.name.split(",")[0]: row for row in _rows(np.exp(-others[:half]).mean(0), own, others[half:], document)}
    for name, sign in (("fragile", -1), ("confident", 1)):
        assert sign * flattered[name].advantage.value > 0.02, "regression to the mean"
        # 5 standard errors: the interval's half is about 2
        assert abs(fair[name].advantage.value) < 2.5 * fair[name].advantage.half
    assert abs(flattered["all"].advantage.value) < 2.5 * flattered["all"].advantage.half


def test_a_router_that_knows_better_is_seen_in_every_class():
    own, others, document = _losses(0.3)
    for row in _rows(np.exp(-others[:8]).mean(0), own, others[8:], document):
        assert row.advantage.low > 0
        assert row.change.low > 0


def test_estimates_are_ratios_with_intervals_over_documents():
    chance = np.random.default_rng(0)
    size = np.full(30, 100.0)
    sums = chance.normal(5.0, 2.0, (1, 30))
    (found,) = estimates(sums, size)
    assert found.value == pytest.approx(sums.sum() / size.sum())
    error = sums[0].std(ddof=1) / 100 / np.sqrt(30)
    assert found.half == pytest.approx(2.045 * error, rel=1e-3), "the textbook interval where documents are equal"
    assert estimates(np.ones((1, 3)), np.array([5.0, 0, 0]))[0].half is None, "one document says nothing of the next"
    assert estimates(np.zeros((1, 3)), np.full(3, 5.0))[0].p == 1.0


def test_what_has_no_p_is_not_corrected_for():
    known = estimates(np.random.default_rng(1).normal(1, 0.1, (2, 9)), np.full(9, 10.0))
    unknown = estimates(np.ones((1, 1)), np.ones(1))
    told = corrected([known[0], unknown[0], known[1]])
    assert told[1] is None
    assert told[0] == pytest.approx(min(1.0, 2 * min(known[0].p, known[1].p)), rel=1e-6) or told[0] >= known[0].p
