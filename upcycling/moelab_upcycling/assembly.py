"""From what an initialiser made to the bytes of a tensor, some rows at a time: what follows finds them in the cache.

A matrix whose plan says where each row comes from is never held whole where it goes to the file as it stands: a block
of rows is gathered, hashed while it is in the cache, and done. One that is turned has to be there first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.initialisers import NeuronPlan
from moelab_upcycling.neurons import place_rows, planned_rows
from moelab_upcycling.source import transpose_into

SLAB = 128  # rows handed on at a time
Values = npt.NDArray[Any]


class Scratch:
    """An array to fill, in memory that is used again: until the next call."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def __call__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Values:
        size = shape[0] * shape[1] * dtype.itemsize
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def made_rows(rows: Values, *, turned: bool, scratch: Scratch) -> Iterator[Values]:
    """rows [n, D], or turned [D, n]."""
    if turned:
        yield from _turned([rows], scratch)
        return
    for start in range(0, len(rows), SLAB):
        yield np.ascontiguousarray(rows[start : start + SLAB])


def assembled(
    plan: NeuronPlan, matrix: str, values: Values, new: Values, *, turned: bool, scratch: Scratch
) -> Iterator[Values]:
    """The planned rows of the dense `values` [F, D] with `new` [k, D] in place of those that change."""
    changed = plan.changed(matrix)
    if turned:
        kept = len(changed) - len(new)
        in_order = not changed[:kept].any() and np.array_equal(plan.source[:kept], np.arange(kept))
        # What is the dense FFN itself, and then something, needs no copy: at 7B's width it would be 147 MB.
        parts = [values[:kept], new] if in_order else [planned_rows(plan, matrix, values, new)]
        yield from _turned(parts, scratch)
        return
    done = 0
    for start in range(0, len(changed), SLAB):
        here = changed[start : start + SLAB]
        count = int(np.count_nonzero(here))
        out = scratch((len(here), values.shape[1]), values.dtype)
        place_rows(out, plan.source[start : start + SLAB], here, values, new[done : done + count])
        done += count
        yield out


def _turned(parts: list[Values], scratch: Scratch) -> Iterator[Values]:
    """The parts' rows, one part after the other, as columns: [D, n]."""
    count, width = sum(map(len, parts)), parts[0].shape[1]
    for start in range(0, width, SLAB):
        slab = scratch((min(SLAB, width - start), count), parts[0].dtype)
        column = 0
        for part in parts:
            transpose_into(part[:, start : start + SLAB], slab[:, column : column + len(part)])
            column += len(part)
        yield slab
