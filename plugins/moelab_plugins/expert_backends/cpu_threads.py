"""The CPU's cores side by side, each on its own experts: many small matmuls run best with one thread each.

The whole expert MLP is one autograd node. It keeps x and the gate_up rows for the backward pass and
recomputes the rest chunk by chunk in the cache; weight gradients are written in place, without a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moelab import BackendContext, Component, ExpertBackend, Routing, component, hookimpl
from moelab.moe.contracts import ExpertProblem
from moelab.moe.dispatch import Dispatch, dispatch_plan, inverse_permutation, sum_rows
from moelab.moe.experts import ExpertBank, compute_dtype

CHUNK_ROWS = 1024  # of one task: its temporaries (D + 4F numbers a row) should stay in the L2 cache


@dataclass
class CPUThreadsOptions:
    pass


class CPUThreadsBackend:
    """Experts shared out over threads, one autograd node for all of them."""

    name = "cpu_threads"

    def __init__(self, options: CPUThreadsOptions, context: BackendContext) -> None:
        pass

    def supports(self, problem: ExpertProblem) -> str | None:
        if problem.device.type != "cpu":
            return f"runs on the CPU only, not on {problem.device.type}; use grouped_mm"
        return None

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        dtype = compute_dtype(x)
        rows = _rows(routing, dispatch_plan(routing), padded=dtype in (torch.bfloat16, torch.float16))
        y: Tensor = _ExpertMLP.apply(x.to(dtype), routing.weight, bank.gate_up.to(dtype), bank.down.to(dtype), rows)
        return y.to(x.dtype)


@dataclass(frozen=True)
class _Rows:
    """The rows in expert order, padded to sizes that come again. R rows for N assignments.

    oneDNN, which serves bf16, compiles a kernel for each new shape: with the experts' ever new counts that
    took three times as long as the products. A padding row repeats a token of its own expert with weight 0,
    so that a NaN stays in its expert.
    """

    token: Tensor  # [R] int64
    slot: Tensor  # [N] int64: the row of each assignment
    by_token: Tensor  # [N] int64: rows grouped by token ...
    starts: Tensor  # [T] int64: ... those of token t begin at starts[t]
    sizes: list[int]  # rows of each expert


def _rows(routing: Routing, plan: Dispatch, padded: bool) -> _Rows:
    counts = plan.counts.tolist()
    if not padded:
        return _Rows(plan.token, inverse_permutation(plan.order), plan.by_token, plan.starts, counts)
    sizes = [_padded_size(count) for count in counts]
    size = torch.tensor(sizes)
    shift = (size.cumsum(0) - size) - (plan.counts.cumsum(0) - plan.counts)  # [E]
    row = torch.arange(plan.order.numel()) + shift.repeat_interleave(plan.counts)  # [N], by expert
    filler = plan.token.new_zeros(len(sizes)).index_copy_(0, routing.expert, routing.token)  # some token of each expert
    token = filler.repeat_interleave(size).index_copy_(0, row, plan.token)
    slot = torch.empty_like(row).index_copy_(0, plan.order, row)
    return _Rows(token, slot, row.index_select(0, plan.by_token), plan.starts, sizes)


def _padded_size(count: int) -> int:
    """Up to a multiple of an eighth of its power of two, at least 32: eight sizes an octave, 6% padding."""
    unit = max(32, 1 << (count.bit_length() - 4)) if count >= 8 else 32
    return -(-count // unit) * unit


@dataclass(frozen=True)
class _Chunk:
    """Consecutive experts whose rows are computed by one thread."""

    experts: range
    rows: slice
    sizes: list[int]  # rows of each expert

    def each(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The experts' parts of tensors that hold this chunk's rows."""
        return list(zip(*(tensor.split(self.sizes) for tensor in tensors), strict=True))


def _chunks(counts: Sequence[int], threads: int) -> tuple[list[_Chunk], list[_Chunk]]:
    """(for all threads together, for one thread each): an expert with a large share of the rows would keep
    one thread busy while the others wait."""
    total = sum(counts)
    large = max(CHUNK_ROWS, total // (2 * threads)) if threads > 1 else total + 1
    limit = min(CHUNK_ROWS, total // (4 * threads) + 1)
    together: list[_Chunk] = []
    apart: list[_Chunk] = []
    first = start = end = 0
    for expert, count in enumerate(counts):
        if count > large:
            if first < expert:
                apart.append(_Chunk(range(first, expert), slice(start, end), list(counts[first:expert])))
            together.append(_Chunk(range(expert, expert + 1), slice(end, end + count), [count]))
            first, start, end = expert + 1, end + count, end + count
            continue
        if first < expert and end + count - start > limit:
            apart.append(_Chunk(range(first, expert), slice(start, end), list(counts[first:expert])))
            first, start = expert, end
        end += count
    if first < len(counts):
        apart.append(_Chunk(range(first, len(counts)), slice(start, end), list(counts[first:])))
    return together, sorted(apart, key=lambda chunk: chunk.rows.start - chunk.rows.stop)  # longest first


class _ExpertMLP(torch.autograd.Function):
    """y[t] = sum over t's assignments of weight * down(silu(gate x_t) * up x_t)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, order: _Rows) -> Tensor:
        hidden = x.new_empty(order.token.numel(), gate_up.shape[1])  # [R, 2F]
        out = x.new_empty(order.token.numel(), x.shape[1])  # [R, D]
        width = down.shape[1]

        def compute(chunk: _Chunk) -> None:
            rows = x.index_select(0, order.token[chunk.rows])
            pre = hidden[chunk.rows]
            for expert, (piece, into) in zip(chunk.experts, chunk.each(rows, pre), strict=True):
                torch.mm(piece, gate_up[expert].t(), out=into)
            act = torch.nn.functional.silu(pre[:, :width]).mul_(pre[:, width:])
            for expert, (piece, into) in zip(chunk.experts, chunk.each(act, out[chunk.rows]), strict=True):
                torch.mm(piece, down[expert], out=into)

        _run(compute, order.sizes)
        row_weight = weight.new_zeros(order.token.numel()).index_copy_(0, order.slot, weight)
        ctx.save_for_backward(x, row_weight, gate_up, down, hidden)
        ctx.order = order
        return sum_rows(out, order.by_token, order.starts, row_weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, row_weight, gate_up, down, hidden = ctx.saved_tensors
        order: _Rows = ctx.order
        grad_y = grads[0].contiguous()
        scale = row_weight.to(x.dtype).unsqueeze(-1)  # [R, 1]
        grad_row_weight = torch.empty_like(row_weight)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_rows = x.new_empty(order.token.numel(), x.shape[1])
        width = down.shape[1]

        def compute(chunk: _Chunk) -> None:
            token = order.token[chunk.rows]
            rows, spread = x.index_select(0, token), grad_y.index_select(0, token)  # [r, D]
            gate, up = hidden[chunk.rows].split(width, 1)
            grad_act = rows.new_empty(rows.shape[0], width)
            for expert, (piece, into) in zip(chunk.experts, chunk.each(spread, grad_act), strict=True):
                torch.mm(piece, down[expert].t(), out=into)
            silu = torch.nn.functional.silu(gate)
            act = silu * up
            # <dy, down act> = <down^T dy, act>: the routing weight's gradient without keeping the output rows.
            torch.sum(grad_act * act, 1, dtype=row_weight.dtype, out=grad_row_weight[chunk.rows])
            act.mul_(scale[chunk.rows])
            grad_act.mul_(scale[chunk.rows])
            grad_pre = torch.empty_like(hidden[chunk.rows])
            torch.mul(grad_act, silu, out=grad_pre[:, width:])
            torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_pre[:, :width])
            parts = chunk.each(act, spread, grad_pre, rows, grad_rows[chunk.rows])
            for expert, (hid, dy, piece, row, into) in zip(chunk.experts, parts, strict=True):
                torch.mm(hid.t(), dy, out=grad_down[expert])
                torch.mm(piece.t(), row, out=grad_gate_up[expert])
                torch.mm(piece, gate_up[expert], out=into)

        _run(compute, order.sizes)
        grad_x = sum_rows(grad_rows, order.by_token, order.starts)
        return grad_x, grad_row_weight.index_select(0, order.slot), grad_gate_up, grad_down, None


def _run(compute: Callable[[_Chunk], None], counts: Sequence[int]) -> None:
    """Large experts one after the other on all threads, the others side by side on one thread each."""
    threads = torch.get_num_threads()
    together, apart = _chunks(counts, threads)
    for chunk in together:
        compute(chunk)
    if threads == 1 or len(apart) < 2:
        for chunk in apart:
            compute(chunk)
        return
    queue = iter(apart)

    @torch.no_grad()  # the mode belongs to a thread
    def work() -> None:
        for chunk in queue:  # next() on a list's iterator is atomic
            compute(chunk)

    for future in [_pool(threads).submit(work) for _ in range(threads)]:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """`threads` workers whose matmuls use one thread; shared by all layers, started when first used."""
    everyone = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, "experts", initializer=_one_thread)
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)  # the last setting is also the default of threads yet to come
    return pool


def _one_thread() -> None:
    """Only the first look at the number makes a thread take the default, which would undo an earlier setting."""
    torch.get_num_threads()
    torch.set_num_threads(1)


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("cpu_threads", CPUThreadsOptions, CPUThreadsBackend)]
