"""Arrays end to end: the same as one array, whatever is asked of it."""

from __future__ import annotations

import numpy as np
import pytest

from moelab.data.joined import JoinedTokens

PARTS = [np.arange(5, dtype=np.uint16), np.arange(70_000, 70_003, dtype=np.int32), np.arange(9, dtype=np.uint16)]
WHOLE = np.concatenate([part.astype(np.int64) for part in PARTS])


def test_it_is_what_the_arrays_make_together() -> None:
    joined, chance = JoinedTokens(PARTS), np.random.default_rng(0)
    assert (len(joined), joined.shape, joined.ndim, joined.dtype) == (17, (17,), 1, np.int32)
    for begin in range(-18, 19):
        for end in [*range(-18, 19), None]:
            assert np.array_equal(joined[begin:end], WHOLE[begin:end]), (begin, end)
    places = chance.integers(0, 17, (6, 4))
    assert np.array_equal(joined[places], WHOLE[places]) and joined[places].dtype == np.int32
    assert [int(joined[n]) for n in (-1, 0, 5, 16)] == [8, 0, 70_000, 8]


def test_nothing_is_copied_within_a_part() -> None:
    assert np.shares_memory(JoinedTokens(PARTS)[1:4], PARTS[0])
    with pytest.raises(AssertionError):
        JoinedTokens(PARTS)[::2]
