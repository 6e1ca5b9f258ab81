"""Multipliers: curves whose factor is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moelab_tools.compare.multipliers import Curve, multiplier


def falling(factor: float, points: int = 400) -> Curve:
    """2 - log(factor x) / 10 at x of 1 to 100: straight in the logarithm, so that interpolation is exact."""
    spent = np.geomspace(1, 100, points)
    return Curve(spent, 2 - np.log(factor * spent) / 10)


@pytest.mark.parametrize("factor", [1.5, 0.5, 1.0])
def test_a_curve_that_is_reached_with_less_gives_its_factor(factor: float) -> None:
    found = multiplier("tokens", [(falling(factor), falling(1.0))], 0.0, 1.0)
    assert found is not None
    assert found.factor == pytest.approx(factor)
    assert (found.low, found.covers, found.resolved) == (None, "nothing", False)


def test_over_pairs_it_is_the_t_interval_of_logarithms() -> None:
    factors = [1.4, 1.5, 1.7]
    found = multiplier("flops", [(falling(one), falling(1.0)) for one in factors], 0.0, 1.0)
    exact = stats.ttest_1samp(np.log(factors), 0).confidence_interval()
    assert found is not None and found.resolved
    assert (found.low, found.high) == pytest.approx((math.exp(exact.low), math.exp(exact.high)))


def test_the_error_of_the_text_goes_through_the_slope() -> None:
    found = multiplier("tokens", [(falling(2.0), falling(1.0))], 0.01, 30.0)
    assert found is not None and found.high is not None
    assert math.log(found.high / found.factor) == pytest.approx(stats.t.ppf(0.975, 30) * 0.01 / 0.1)
    assert (found.covers, found.resolved) == ("held-out text", False)


def test_two_pairs_are_never_resolved() -> None:
    found = multiplier("tokens", [(falling(2.0), falling(1.0)), (falling(2.0001), falling(1.0))], 0.0, 1.0)
    assert found is not None and not found.resolved


def test_curves_that_never_meet_have_no_multiplier() -> None:
    high = Curve(np.array([1.0, 10.0]), np.array([5.0, 4.0]))
    low = Curve(np.array([1.0, 10.0]), np.array([3.0, 2.0]))
    assert multiplier("tokens", [(low, high)], 0.0, 1.0) is None
    assert multiplier("tokens", [], 0.0, 1.0) is None


def test_points_before_anything_was_spent_are_left_out() -> None:
    curve = Curve.of([0, 10, 20], [6.0, 5.0, math.nan])
    assert (list(curve.spent), list(curve.loss)) == ([10.0], [5.0])


def test_what_only_the_schedule_of_the_lower_run_explains_is_not_resolved() -> None:
    """The variant ended lower and yet spent more to reach the baseline's loss: it was read before its end."""
    variant = [Curve(4 * falling(factor).spent, falling(factor).loss) for factor in (1.5, 1.6, 1.7)]
    found = multiplier("flops", [(one, falling(1.0)) for one in variant], 0.0, 1.0)
    assert found is not None and found.high is not None
    assert found.high < 1 and not found.resolved
