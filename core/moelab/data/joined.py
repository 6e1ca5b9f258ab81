"""Arrays end to end, read as one: token files that lie apart, none of them copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np


class JoinedTokens:
    """What `TokenStream.tokens` must do of an array: its length and type, slices, and picks by place."""

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: arrays [N_i] of whole numbers, in whatever types; read in the smallest that holds all of them."""
        self._parts = list(parts)
        self.dtype = np.result_type(*self._parts)
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: int) -> np.integer: ...
    def __getitem__(self, index: slice | np.ndarray | int) -> np.ndarray | np.integer:
        """A slice without a step, a view where it lies in one part; or places [...] int64 -> [...]."""
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            assert step == 1, step
            return self._between(begin, max(begin, end))
        places = np.asarray(index)
        found = np.empty(places.shape, self.dtype)
        flat = np.where(places < 0, places + len(self), places)
        which = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(which):
            part, mine = self._parts[number], which == number
            found[mine] = part[flat[mine] - (int(self._ends[number]) - len(part))]
        return found if places.ndim else found[()]

    def _between(self, begin: int, end: int) -> np.ndarray:
        pieces = []
        for number in range(int(np.searchsorted(self._ends, begin, side="right")), len(self._parts)):
            part, first = self._parts[number], int(self._ends[number]) - len(self._parts[number])
            if first >= end:
                break
            pieces.append(part[max(begin - first, 0) : end - first])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.zeros(0, self.dtype), *pieces]).astype(self.dtype, copy=False)


Tokens = np.ndarray | JoinedTokens  # [N], whole numbers
