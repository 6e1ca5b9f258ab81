"""A shuffled order of 0 .. size-1 that is computed, not stored: any element of it in constant memory.

A Feistel network permutes the numbers of 2k bits whatever its round function is (Luby & Rackoff 1988);
walking on until a number falls below `size` makes of that a permutation of 0 .. size-1 (Black & Rogaway 2002).
"""

from __future__ import annotations

import numpy as np

from moelab.data.identity import mix
from moelab.seeds import derive_seed

ROUNDS = 6  # four are proven enough for a random round function; ours is only well mixed


class Permutation:
    """`Permutation(size, seed)(index)` for index [n] int64 in 0 .. size-1 -> [n] int64, a bijection."""

    def __init__(self, size: int, seed: int) -> None:
        assert size >= 1, size
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = [np.uint64(derive_seed(seed, "round", number)) for number in range(ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        value = self._feistel(np.asarray(index, np.uint64))
        outside = value >= self.size
        while outside.any():  # fewer than four numbers in all for each one inside: a few rounds
            value[outside] = self._feistel(value[outside])
            outside = value >= self.size
        return value.astype(np.int64)

    def _feistel(self, value: np.ndarray) -> np.ndarray:
        shift = np.uint64(self.half_bits)
        mask = np.uint64((1 << self.half_bits) - 1)
        left, right = value >> shift, value & mask
        for key in self.keys:
            left, right = right, left ^ (mix(right + key) & mask)
        return (left << shift) | right
