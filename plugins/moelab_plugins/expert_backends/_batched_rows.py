"""How `batched` lays out the rows of its experts: runs of experts with one number of rows, chunks of runs.

N assignments of T tokens become R rows in expert order. E experts, X and Y columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import Routing
from moelab.moe.dispatch import Dispatch

ROW_BYTES = 8192  # a batched product, and a chunk, has so many bytes a column: 2048 rows in fp32, 4096 in bf16
HALF = (torch.bfloat16, torch.float16)  # served by oneDNN, which wants sizes that come again
LEAST_UNIT = 16  # of sizes, where they are rounded up
PRICE, PRICE_HALF = 1 / 16, 1 / 8  # what padding may add to the rows of one product; half precision gains more from it
# Where rows are few it may add these to each expert's: a product costs some µs beside its FLOPs, and waits for its
# weights anyway. The fewer the larger the expert: SPARE_NUMBERS by the numbers of its down matrix.
SPARE_ROWS, SPARE_NUMBERS, SPARE_NUMBERS_HALF = 8, 1 << 18, 1 << 20


@dataclass(frozen=True)
class Rows:
    """The rows in expert order, padded so that neighbouring experts of like load have equally many.

    A padding row repeats a token of its own expert with weight 0, so that a NaN stays in its expert.
    """

    token: Tensor  # [R] int64
    slot: Tensor  # [N] int64: the row of each assignment
    by_token: Tensor  # [N] int64: rows grouped by token ...
    starts: Tensor  # [T] int64: ... those of token t begin at starts[t]
    runs: list[Run]


@dataclass(frozen=True)
class Run:
    """Consecutive experts with equally many rows each: one batched product."""

    experts: slice
    size: int  # rows of each
    start: int  # its first row

    @property
    def count(self) -> int:
        """Experts."""
        return int(self.experts.stop - self.experts.start)

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.start + self.count * self.size

    def each(self, rows: Tensor) -> Tensor:
        """Its rows [r, X] -> [experts, size, X]."""
        return rows.view(self.count, self.size, rows.shape[1])


@dataclass(frozen=True)
class Chunk:
    """Consecutive runs, computed together. Tensors of rows below hold this chunk's alone."""

    runs: list[Run]

    @property
    def rows(self) -> slice:
        return slice(self.runs[0].start, self.runs[-1].stop)

    def multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """out [r, Y] = rows [r, X] times each row's expert of weights [E, X, Y]."""
        for run, a, c in self._parts(rows, out):
            if run.count == 1:  # MKL's batched product of one is slower than its plain one
                torch.mm(a, weights[run.experts.start], out=c)
            else:
                torch.bmm(run.each(a), weights[run.experts], out=run.each(c))

    def add(self, bias: Tensor, out: Tensor) -> None:
        """out [r, Y] += each row's expert's bias, of bias [E, Y]."""
        for run, c in self._parts(out):
            run.each(c).add_(bias[run.experts].unsqueeze(1))

    def total(self, rows: Tensor, out: Tensor) -> None:
        """out [E, Y], this chunk's experts: the sum of each expert's rows [r, Y]."""
        self._clear(out)
        for run, a in self._parts(rows):
            torch.sum(run.each(a), 1, out=out[run.experts])

    def outer(self, rows: Tensor, others: Tensor, out: Tensor) -> None:
        """out [E, X, Y], this chunk's experts: the sum over an expert's rows of row^T other; of [r, X] and [r, Y]."""
        self._clear(out)
        for run, a, b in self._parts(rows, others):
            if run.count == 1:
                torch.mm(a.t(), b, out=out[run.experts.start])
            else:
                torch.bmm(run.each(a).transpose(1, 2), run.each(b), out=out[run.experts])

    def _clear(self, out: Tensor) -> None:
        """Zero what belongs to experts without rows."""
        for run in self.runs:
            if run.size == 0:
                out[run.experts].zero_()

    def _parts(self, *each: Tensor) -> Iterator[tuple[Any, ...]]:
        """(run, its rows of each tensor [r, X]), where there are any."""
        runs = [run for run in self.runs if run.size]
        lengths = [run.stop - run.start for run in runs]
        return zip(runs, *(rows.split(lengths) for rows in each), strict=True)


def lay_out(routing: Routing, plan: Dispatch, down: Tensor) -> Rows:
    """The rows of a routing, for products with matrices of the sizes and dtype of down [E, F, D]."""
    runs = make_runs(plan.counts.tolist(), down.dtype, down[0].numel())
    size = torch.tensor([run.size for run in runs for _ in range(run.count)])
    shift = (size.cumsum(0) - size) - (plan.counts.cumsum(0) - plan.counts)  # [E]
    row = torch.arange(plan.order.numel()) + shift.repeat_interleave(plan.counts)  # [N], by expert
    filler = plan.token.new_zeros(len(size)).index_copy_(0, routing.expert, routing.token)  # some token of each expert
    token = filler.repeat_interleave(size).index_copy_(0, row, plan.token)
    slot = torch.empty_like(row).index_copy_(0, plan.order, row)
    return Rows(token, slot, row.index_select(0, plan.by_token), plan.starts, runs)


def make_runs(counts: Sequence[int], dtype: torch.dtype, numbers: int) -> list[Run]:
    """Runs of up to a power of two of experts, in order; those whose counts differ too much are halved.

    `numbers`: of an expert's down matrix, F D.
    """
    half = dtype in HALF
    mean = max(1.0, sum(counts) / len(counts))
    most = 1 << max(0, round(math.log2(ROW_BYTES / dtype.itemsize / mean)))
    sizes = [round_up(count) for count in counts] if half else list(counts)
    price = PRICE_HALF if half else PRICE
    spare = min(SPARE_ROWS, (SPARE_NUMBERS_HALF if half else SPARE_NUMBERS) / numbers)
    runs: list[Run] = []
    start = 0
    for first in range(0, len(counts), most):
        for experts, size in _halved(sizes, slice(first, min(first + most, len(counts))), price, spare):
            runs.append(Run(experts, size, start))
            start = runs[-1].stop
    return runs


def _halved(sizes: Sequence[int], experts: slice, price: float, spare: float) -> Iterator[tuple[slice, int]]:
    """(experts, rows of each): all at once if one size for all adds no more than the price, or the spare rows.

    An expert without rows has no token to repeat, so it can't be padded.
    """
    inside = sizes[experts]
    largest, total, count = max(inside), sum(inside), len(inside)
    affordable = count * largest - total <= max(price * total, spare * count)
    if count == 1 or (affordable and (min(inside) > 0 or largest == 0)):
        yield experts, largest
        return
    middle = (experts.start + experts.stop) // 2
    yield from _halved(sizes, slice(experts.start, middle), price, spare)
    yield from _halved(sizes, slice(middle, experts.stop), price, spare)


def round_up(count: int) -> int:
    """Up to a multiple of an eighth of its power of two, at least 16: eight sizes an octave, 6% padding.

    oneDNN, which serves bf16, compiles a kernel for each new shape: with the experts' ever new counts that took three
    times as long as the products.
    """
    unit = max(LEAST_UNIT, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


def make_chunks(runs: Sequence[Run], dtype: torch.dtype) -> list[Chunk]:
    """All runs in order; what a chunk recomputes in the backward pass should stay in the last level of cache."""
    chunks: list[Chunk] = []
    held: list[Run] = []
    for run in runs:
        if held and run.stop - held[0].start > ROW_BYTES // dtype.itemsize:
            chunks.append(Chunk(held))
            held = []
        held.append(run)
    return [*chunks, Chunk(held)]
