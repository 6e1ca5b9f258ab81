"""One FFN matrix of a dense layer, with the sums that the statistics of any subset of its neurons follow from."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab_upcycling.dtypes import to_float32

_CHUNK = 32768  # values summed at a time


class LoadedMatrix:
    """values [F, D], neuron-major. Implements moelab.initialisers.DenseMatrix."""

    def __init__(self, values: npt.NDArray[Any], dtype: str) -> None:
        self.values = values
        self.dtype = dtype

    def float32(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """rows [n] -> [n, D]."""
        return to_float32(self.values[rows], self.dtype)

    def sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Sum and sum of squares of each row, [F] and [F], in float64."""
        return self._sums

    @cached_property
    def _sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        count, width = self.values.shape
        total, squares = np.empty(count), np.empty(count)
        step = max(1, _CHUNK // width)
        buffer = np.empty((step, width))
        for start in range(0, count, step):
            rows = self.values[start : start + step]
            piece = buffer[: len(rows)]
            np.copyto(piece, to_float32(rows, self.dtype))
            piece.sum(axis=1, out=total[start : start + step])
            np.einsum("ij,ij->i", piece, piece, out=squares[start : start + step])
        return total, squares


def statistics(dense: Any, rows: npt.NDArray[Any] | None = None) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of the rows' values; of all rows where none are named."""
    total, squares = dense.sums()
    if rows is not None:
        total, squares = total[rows], squares[rows]
    count = total.size * dense.values.shape[1]
    if count == 0:
        return 0.0, 0.0
    mean = float(total.sum()) / count
    spread = float(squares.sum()) - count * mean * mean
    return mean, float(np.sqrt(max(0.0, spread) / max(1, count - 1)))
