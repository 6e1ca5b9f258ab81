"""How `batched` lays out the rows of its experts: runs of experts with one number of rows, chunks of runs.

N assignments of T tokens become R rows in expert order. E experts, X and Y columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moelab import Routing
from moelab.kernels.onednn import alone_from, onednn_serves, outer, product, round_up
from moelab.moe.dispatch import Dispatch

ROW_BYTES = 8192  # a batched product, and a chunk, has so many bytes a column: 2048 rows in fp32, 4096 in bf16
HALF = (torch.bfloat16, torch.float16)  # served by oneDNN, which wants sizes that come again
# The gradients of weights of experts that are multiplied alone gain less from oneDNN: from so many FLOPs on.
OUTER_FLOPS = 3e7
PRICE, PRICE_HALF = 1 / 16, 1 / 8  # what padding may add to the rows of one product; half precision gains more from it
# Where rows are few it may add these to each expert's: a product costs some µs beside its FLOPs, as many as dozens of
# rows of a small expert in half precision, and waits for its weights anyway. The fewer the larger the expert:
# SPARE_NUMBERS by the numbers of its down matrix.
SPARE_ROWS, SPARE_ROWS_HALF, SPARE_NUMBERS, SPARE_NUMBERS_HALF = 8, 128, 1 << 18, 1 << 20


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
    alone: bool = False  # its experts are multiplied one after the other, by oneDNN

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

    @cached_property
    def experts(self) -> slice:
        return slice(self.runs[0].experts.start, self.runs[-1].experts.stop)

    @cached_property
    def alone(self) -> list[int] | None:
        """Rows of each expert, where all are multiplied alone."""
        if not all(run.alone and run.size for run in self.runs):
            return None
        return [run.size for run in self.runs for _ in range(run.count)]

    def multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """out [r, Y] = rows [r, X] times each row's expert of weights [E, X, Y]."""
        if self.alone is not None:  # the same as below, with views made at once: of many experts they cost as much
            _each_alone(rows, weights[self.experts], out, self.alone)
            return
        for run, a, c in self._parts(rows, out):
            if run.alone:
                _each_alone(a, weights[run.experts], c, [run.size] * run.count)
            elif run.count == 1:  # MKL's batched product of one is slower than its plain one
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
            if run.alone and 2 * run.size * a.shape[1] * b.shape[1] >= OUTER_FLOPS:
                for some, other, into in zip(a.split(run.size), b.split(run.size), out[run.experts], strict=True):
                    into.copy_(outer(some, other))
            elif run.count == 1:
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


def _each_alone(rows: Tensor, weights: Tensor, out: Tensor, sizes: Sequence[int]) -> None:
    """out [r, Y] = rows [r, X] times weights [e, X, Y], of each expert `sizes` rows."""
    matrices = weights.transpose(1, 2).unbind()
    for some, matrix, into in zip(rows.split(sizes), matrices, out.split(sizes), strict=True):
        into.copy_(product(some, matrix))


def lay_out(routing: Routing, plan: Dispatch, down: Tensor) -> Rows:
    """The rows of a routing, for products with matrices of the sizes and dtype of down [E, F, D]."""
    alone = alone_from(down[0].numel()) if onednn_serves(down) else math.inf
    runs = make_runs(plan.counts.tolist(), down.dtype, down[0].numel(), alone)
    size = torch.tensor([run.size for run in runs for _ in range(run.count)])
    shift = (size.cumsum(0) - size) - (plan.counts.cumsum(0) - plan.counts)  # [E]
    row = torch.arange(plan.order.numel()) + shift.repeat_interleave(plan.counts)  # [N], by expert
    filler = plan.token.new_zeros(len(size)).index_copy_(0, routing.expert, routing.token)  # some token of each expert
    token = filler.repeat_interleave(size).index_copy_(0, row, plan.token)
    slot = torch.empty_like(row).index_copy_(0, plan.order, row)
    return Rows(token, slot, row.index_select(0, plan.by_token), plan.starts, runs)


def make_runs(counts: Sequence[int], dtype: torch.dtype, numbers: int, alone: float = math.inf) -> list[Run]:
    """Runs of up to a power of two of experts, in order; those whose counts differ too much are halved.

    `numbers`: of an expert's down matrix, F D. `alone`: rows from which an expert is multiplied alone.
    """
    mean = max(1.0, sum(counts) / len(counts))
    most = 1 << max(0, round(math.log2(ROW_BYTES / dtype.itemsize / mean)))
    padding = Padding.of(dtype, numbers, mean, alone)
    sizes = list(map(padding.size, counts))
    runs: list[Run] = []
    start = 0
    for first in range(0, len(counts), most):
        for experts, size in _halved(sizes, slice(first, min(first + most, len(counts))), padding):
            runs.append(Run(experts, size, start, size >= padding.alone))
            start = runs[-1].stop
    return runs


@dataclass(frozen=True)
class Padding:
    """How many rows are added to those of experts."""

    price: float  # of the rows of a run, for one size of all
    spare: float  # of each expert, where rows are few
    half: bool
    alone: float = math.inf  # rows, from which an expert is multiplied alone

    @classmethod
    def of(cls, dtype: torch.dtype, numbers: int, mean: float, alone: float) -> Padding:
        """As `make_runs` has them; `mean`: rows of an expert."""
        half = dtype in HALF
        spare = min(SPARE_ROWS, SPARE_NUMBERS / numbers)
        if half:  # of which padding makes no more than half as many again where rows are many
            spare = min(max(SPARE_ROWS, mean / 2), SPARE_ROWS_HALF, SPARE_NUMBERS_HALF / numbers)
        return cls(PRICE_HALF if half else PRICE, spare, half, alone)

    def size(self, count: int) -> int:
        """Of an expert alone, as oneDNN wants it: a number of rows that comes again."""
        return round_up(count) if self.half or count >= self.alone else count

    def affords(self, sizes: Sequence[int]) -> bool:
        """Whether experts of these sizes are multiplied at once, all with the rows of the largest."""
        largest, total = max(sizes), sum(sizes)
        added = len(sizes) * largest - total
        if largest >= self.alone:
            return added == 0
        return added <= max(self.price * total, self.spare * len(sizes))


def _halved(sizes: Sequence[int], experts: slice, padding: Padding) -> Iterator[tuple[slice, int]]:
    """(experts, rows of each): all at once if the padding affords it.

    An expert without rows has no token to repeat, so it can't be padded.
    """
    inside = sizes[experts]
    largest = max(inside)
    if len(inside) == 1 or (padding.affords(inside) and (min(inside) > 0 or largest == 0)):
        yield experts, largest
        return
    middle = (experts.start + experts.stop) // 2
    yield from _halved(sizes, slice(experts.start, middle), padding)
    yield from _halved(sizes, slice(middle, experts.stop), padding)


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
