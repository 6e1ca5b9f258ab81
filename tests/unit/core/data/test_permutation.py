"""A computed shuffle is a bijection, differs by seed, and looks shuffled."""

from __future__ import annotations

import numpy as np
import pytest

from moelab.data.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_every_number_comes_exactly_once(size: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, 7)(np.arange(size))), np.arange(size))


def test_the_order_depends_on_the_seed_alone() -> None:
    index = np.arange(1000)
    first = Permutation(1000, 1)(index)
    assert np.array_equal(first, Permutation(1000, 1)(index))
    assert np.array_equal(first[[5, 900]], Permutation(1000, 1)(np.array([5, 900])))  # any part by itself
    assert not np.array_equal(first, Permutation(1000, 2)(index))


def test_the_order_looks_random() -> None:
    """No correlation of place and value, nor of neighbours: within 4 standard errors, 4/sqrt(n)."""
    size = 20_000
    order = Permutation(size, 3)(np.arange(size))
    bound = 4 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < bound
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < bound
    # A random permutation has about one fixed point and one neighbour that stays a neighbour.
    assert (order == np.arange(size)).sum() < 10
    assert (np.diff(order) == 1).sum() < 10


def test_sizes_beyond_memory_need_none() -> None:
    size = 2**40 + 12345
    order = Permutation(size, 0)(np.arange(1000))
    assert order.max() < size
    assert order.max() > size // 2
    assert len(np.unique(order)) == 1000
