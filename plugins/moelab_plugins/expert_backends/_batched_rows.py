"""How `batched` lays out the rows of its experts: runs of experts with one number of rows, chunks of runs.

N assignments of T tokens become R rows in expert order. E experts, X and Y columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Routing
from moelab.moe.dispatch import Dispatch

ROW_BYTES = 8192  # a batched product, and a chunk, has so many bytes a column: 2048 rows in fp32, 4096 in bf16
HALF = (torch.bfloat16, torch.float16)  # served by oneDNN, which wants sizes that come again
LEAST_UNIT = 16  # of sizes, where they are rounded up


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


@dataclass(frozen=True)
class Chunk:
    """Consecutive runs, computed together. Tensors of rows below hold this chunk's alone."""

    runs: list[Run]

    @property
    def rows(self) -> slice:
        return slice(self.runs[0].start, self.runs[-1].stop)

    def multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """out [r, Y] = rows [r, X] times each row's expert of weights [E, X, Y]."""
        for run in self.runs:
            _product(self._part(rows, run), weights[run.experts], self._part(out, run))

    def add(self, bias: Tensor, out: Tensor) -> None:
        """out [r, Y] += each row's expert's bias, of bias [E, Y]."""
        for run in self.runs:
            self._part(out, run).add_(bias[run.experts].unsqueeze(1))

    def total(self, rows: Tensor, out: Tensor) -> None:
        """out [E, Y], this chunk's experts: the sum of each expert's rows [r, Y]."""
        for run in self.runs:
            torch.sum(self._part(rows, run), 1, out=out[run.experts])

    def outer(self, rows: Tensor, others: Tensor, out: Tensor) -> None:
        """out [E, X, Y], this chunk's experts: the sum over an expert's rows of row^T other; of [r, X] and [r, Y]."""
        for run in self.runs:
            _product(self._part(rows, run).transpose(1, 2), self._part(others, run), out[run.experts])

    def _part(self, rows: Tensor, run: Run) -> Tensor:
        """[r, X] -> [experts of the run, size, X]."""
        at = run.start - self.runs[0].start
        return rows[at : at + run.count * run.size].view(run.count, run.size, rows.shape[1])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [n, i, k] = a [n, i, j] b [n, j, k]."""
    if a.shape[0] == 1:  # MKL's batched product of one is slower than its plain one
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def lay_out(routing: Routing, plan: Dispatch, dtype: torch.dtype) -> Rows:
    """The rows of a routing, for products in `dtype`."""
    runs = make_runs(plan.counts.tolist(), dtype)
    size = torch.tensor([run.size for run in runs for _ in range(run.count)])
    shift = (size.cumsum(0) - size) - (plan.counts.cumsum(0) - plan.counts)  # [E]
    row = torch.arange(plan.order.numel()) + shift.repeat_interleave(plan.counts)  # [N], by expert
    filler = plan.token.new_zeros(len(size)).index_copy_(0, routing.expert, routing.token)  # some token of each expert
    token = filler.repeat_interleave(size).index_copy_(0, row, plan.token)
    slot = torch.empty_like(row).index_copy_(0, plan.order, row)
    return Rows(token, slot, row.index_select(0, plan.by_token), plan.starts, runs)


def make_runs(counts: Sequence[int], dtype: torch.dtype) -> list[Run]:
    """Runs of up to a power of two of experts, in order; those whose counts differ too much are halved."""
    mean = max(1.0, sum(counts) / len(counts))
    most = 1 << max(0, round(math.log2(ROW_BYTES / dtype.itemsize / mean)))
    sizes = [round_up(count) for count in counts] if dtype in HALF else list(counts)
    # What padding may add. Half precision gains more from one product for many experts than fp32 does.
    price = 1 / 8 if dtype in HALF else 1 / 16
    runs: list[Run] = []
    start = 0
    for first in range(0, len(counts), most):
        for experts, size in _halved(sizes, slice(first, min(first + most, len(counts))), price):
            runs.append(Run(experts, size, start))
            start = runs[-1].stop
    return runs


def _halved(sizes: Sequence[int], experts: slice, price: float) -> Iterator[tuple[slice, int]]:
    """(experts, rows of each): all at once if one size for all costs no more than the price.

    An expert without rows has no token to repeat, so it can't be padded.
    """
    inside = sizes[experts]
    largest = max(inside)
    affordable = len(inside) * largest <= sum(inside) * (1 + price)
    if len(inside) == 1 or (affordable and (min(inside) > 0 or largest == 0)):
        yield experts, largest
        return
    middle = (experts.start + experts.stop) // 2
    yield from _halved(sizes, slice(experts.start, middle), price)
    yield from _halved(sizes, slice(middle, experts.stop), price)


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
