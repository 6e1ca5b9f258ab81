"""Orders of experts: each a permutation, and the one by load no worse than chance where loads are known."""

from __future__ import annotations

import itertools
import random

import pytest

from moelab.parallel.placement import by_load, contiguous, violation


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (8, 4), (64, 8), (6, 1), (4, 4)])
def test_orders_hold_every_expert_once(experts: int, ranks: int) -> None:
    loads = [random.Random(experts).random() for _ in range(experts)]
    assert sorted(by_load(loads, ranks)) == contiguous(loads, ranks) == list(range(experts))


def test_two_hot_experts_of_one_rank_are_put_on_two() -> None:
    loads = [0.4, 0.4, 0.05, 0.05, 0.05, 0.05]
    assert violation(loads, contiguous(loads, 2), 2) == pytest.approx(0.7)
    assert violation(loads, by_load(loads, 2), 2) == pytest.approx(0.0)


def test_by_load_is_within_a_third_of_the_best_order() -> None:
    """Of twenty draws in which all orders can be tried."""
    for seed in range(20):
        loads = [random.Random(seed).random() ** 3 for _ in range(6)]
        best = min(violation(loads, order, 2) for order in itertools.permutations(range(6)))
        assert 1 + violation(loads, by_load(loads, 2), 2) <= (4 / 3) * (1 + best)
