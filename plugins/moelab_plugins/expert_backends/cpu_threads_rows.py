"""How `cpu_threads` lays out the rows of its experts and shares them out: runs of experts, chunks of runs.

N assignments of T tokens become R rows in expert order. E experts, X and Y columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Routing
from moelab.moe.dispatch import Dispatch, inverse_permutation

CHUNK_ROWS = 1024  # of one task, twice as many in half precision: its temporaries should stay near a core's cache
RUN_ROWS = 1024  # of one batched product: enough to make its overhead small


@dataclass(frozen=True)
class Rows:
    """The rows in expert order; in half precision padded, so that sizes come again and neighbours share theirs.

    oneDNN, which serves bf16, compiles a kernel for each new shape: with the experts' ever new counts that
    took three times as long as the products. A padding row repeats a token of its own expert with weight 0,
    so that a NaN stays in its expert.
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
    """Consecutive runs whose rows are computed by one thread. Tensors of rows below hold this chunk's alone."""

    runs: list[Run]

    @property
    def rows(self) -> slice:
        return slice(self.runs[0].start, self.runs[-1].stop)

    def multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """out [r, Y] = rows [r, X] times each row's expert of weights [E, X, Y]."""
        for run in self.runs:
            _product(self._part(rows, run), weights[run.experts], self._part(out, run))

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


def lay_out(routing: Routing, plan: Dispatch, padded: bool) -> Rows:
    """The rows of a routing with at least one expert."""
    runs = make_runs(plan.counts.tolist(), padded)
    if not padded:
        return Rows(plan.token, inverse_permutation(plan.order), plan.by_token, plan.starts, runs)
    size = torch.tensor([run.size for run in runs for _ in range(run.count)])
    shift = (size.cumsum(0) - size) - (plan.counts.cumsum(0) - plan.counts)  # [E]
    row = torch.arange(plan.order.numel()) + shift.repeat_interleave(plan.counts)  # [N], by expert
    filler = plan.token.new_zeros(len(size)).index_copy_(0, routing.expert, routing.token)  # some token of each expert
    token = filler.repeat_interleave(size).index_copy_(0, row, plan.token)
    slot = torch.empty_like(row).index_copy_(0, plan.order, row)
    return Rows(token, slot, row.index_select(0, plan.by_token), plan.starts, runs)


def make_runs(counts: Sequence[int], padded: bool) -> list[Run]:
    """Runs of up to a power of two of experts, in order; those whose counts differ too much are halved."""
    mean = max(1.0, sum(counts) / len(counts))
    most = 1 << max(0, round(math.log2(RUN_ROWS / mean)))
    runs: list[Run] = []
    start = 0
    for first in range(0, len(counts), most):
        for experts, size in _halved(counts, slice(first, min(first + most, len(counts))), padded):
            runs.append(Run(experts, size, start))
            start = runs[-1].stop
    return runs


def _halved(counts: Sequence[int], experts: slice, padded: bool) -> Iterator[tuple[slice, int]]:
    """(experts, rows of each): all at once if they are of one size, or can be padded to one for an eighth more rows."""
    inside = counts[experts]
    largest = padded_size(max(inside)) if padded else max(inside)
    alone = sum(padded_size(count) for count in inside) if padded else sum(inside)
    price = alone // 8 if padded else 0
    if len(inside) == 1 or (len(inside) * largest <= alone + price and (min(inside) > 0 or largest == 0)):
        yield experts, largest
        return
    middle = (experts.start + experts.stop) // 2
    yield from _halved(counts, slice(experts.start, middle), padded)
    yield from _halved(counts, slice(middle, experts.stop), padded)


def padded_size(count: int) -> int:
    """Up to a multiple of an eighth of its power of two, at least 32: eight sizes an octave, 6% padding."""
    unit = max(32, 1 << (count.bit_length() - 4)) if count >= 8 else 32
    return -(-count // unit) * unit


def make_chunks(runs: Sequence[Run], threads: int, itemsize: int) -> tuple[list[Chunk], list[Chunk]]:
    """(for all threads together, for one thread each, longest first): an expert with a large share of the rows would
    keep one thread busy while the others wait."""
    total = runs[-1].stop
    most = CHUNK_ROWS * 4 // itemsize
    large = max(most, total // (2 * threads)) if threads > 1 else total + 1
    limit = min(most, total // (4 * threads) + 1)
    together: list[Chunk] = []
    apart: list[Chunk] = []
    held: list[Run] = []
    for run in runs:
        alone = run.stop - run.start > large
        if held and (alone or run.stop - held[0].start > limit):
            apart.append(Chunk(held))
            held = []
        if alone:
            together.append(Chunk([run]))
        else:
            held.append(run)
    if held:
        apart.append(Chunk(held))
    return together, sorted(apart, key=lambda chunk: chunk.rows.start - chunk.rows.stop)
