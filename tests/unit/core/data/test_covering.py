"""Complexity-first diverse selection: beside the loop it is told as, item by item, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moelab.data.covering import complex_and_diverse


def by_the_loop(tags: list[set[str]], count: int, priority: list[int]) -> list[int]:
    """Every round looks at every item that is left."""
    left = sorted(range(len(tags)), key=lambda n: (-len(tags[n]), priority[n], n))
    chosen: list[int] = []
    while len(chosen) < count:
        seen: set[str] = set()
        taken = []
        for n in left:
            if not tags[n] <= seen and len(chosen) + len(taken) < count:
                seen |= tags[n]
                taken.append(n)
        if not taken:
            break
        chosen += taken
        left = [n for n in left if n not in taken]
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_it_takes_what_a_loop_over_all_items_takes_in_the_same_order(seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = [f"t{n}" for n in range(int(generator.integers(1, 9)))]
    tags = [{word for word in words if generator.random() < 0.3} for _ in range(60)]
    priority = generator.integers(0, 5, 60).tolist()
    for count in (1, 7, 30, 99):
        found = complex_and_diverse(tags, count, priority)
        assert found.chosen == by_the_loop(tags, count, priority)
        assert len(found.chosen) == min(count, sum(map(bool, tags))), "what has no tag is never taken"


def test_the_richest_come_first_and_each_round_covers_anew() -> None:
    tags = [{"maths"}, {"code", "python"}, {"code"}, {"code", "maths", "python"}, {"poem"}, set(), {"code", "python"}]
    found = complex_and_diverse(tags, 4)
    assert found.chosen == [3, 4, 1, 0]  # first round: 3 has all of maths, code, python; 4 brings poem; then anew
    assert (found.rounds, found.tags, found.of_tags) == (2, 4, 4)
    assert found.complexity == 7 / 4 and found.of_complexity == 10 / 7
    assert complex_and_diverse(tags, 4, priority=[0, 9, 0, 0, 0, 0, 1]).chosen == [3, 4, 6, 0]
    assert str(found) == "4 in 2 rounds: 4 of 4 tags, 1.75 tags each (of all 1.43)"


def test_the_order_of_items_does_not_matter_where_each_has_a_priority_of_its_own() -> None:
    generator = np.random.default_rng(0)
    tags = [frozenset(generator.choice(8, 3).tolist()) for _ in range(200)]
    priority = generator.permutation(200)
    order = generator.permutation(200)
    found = complex_and_diverse([tags[n] for n in order], 50, priority[order])
    assert [int(order[n]) for n in found.chosen] == complex_and_diverse(tags, 50, priority).chosen


def test_nothing_to_choose_from_is_an_empty_choice() -> None:
    assert complex_and_diverse([], 5).chosen == complex_and_diverse([set(), set()], 5).chosen == []
