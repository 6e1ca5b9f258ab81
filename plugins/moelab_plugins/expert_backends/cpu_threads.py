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
from moelab.moe.dispatch import Dispatch, dispatch_plan, sum_rows
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
        plan = dispatch_plan(routing)
        y: Tensor = _ExpertMLP.apply(x.to(dtype), routing.weight, bank.gate_up.to(dtype), bank.down.to(dtype), plan)
        return y.to(x.dtype)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        counts = plan.counts.tolist()
        hidden = x.new_empty(plan.token.numel(), gate_up.shape[1])  # [N, 2F]
        out = x.new_empty(plan.token.numel(), x.shape[1])  # [N, D]
        width = down.shape[1]

        def compute(chunk: _Chunk) -> None:
            rows = x.index_select(0, plan.token[chunk.rows])
            pre = hidden[chunk.rows]
            for expert, (piece, into) in zip(chunk.experts, chunk.each(rows, pre), strict=True):
                torch.mm(piece, gate_up[expert].t(), out=into)
            act = torch.nn.functional.silu(pre[:, :width]).mul_(pre[:, width:])
            for expert, (piece, into) in zip(chunk.experts, chunk.each(act, out[chunk.rows]), strict=True):
                torch.mm(piece, down[expert], out=into)

        _run(compute, counts)
        ctx.save_for_backward(x, weight, gate_up, down, hidden)
        ctx.plan, ctx.counts = plan, counts
        return sum_rows(out, plan, weight.index_select(0, plan.order))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, weight, gate_up, down, hidden = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        grad_y = grads[0].contiguous()
        row_weight = weight.to(x.dtype).index_select(0, plan.order).unsqueeze(-1)  # [N, 1]
        grad_row_weight = torch.empty_like(weight)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_rows = x.new_empty(plan.token.numel(), x.shape[1])
        width = down.shape[1]

        def compute(chunk: _Chunk) -> None:
            token = plan.token[chunk.rows]
            rows, spread = x.index_select(0, token), grad_y.index_select(0, token)  # [n, D]
            gate, up = hidden[chunk.rows].split(width, 1)
            grad_act = rows.new_empty(rows.shape[0], width)
            for expert, (piece, into) in zip(chunk.experts, chunk.each(spread, grad_act), strict=True):
                torch.mm(piece, down[expert].t(), out=into)
            silu = torch.nn.functional.silu(gate)
            act = silu * up
            # <dy, down act> = <down^T dy, act>: the routing weight's gradient without keeping the output rows.
            torch.sum(grad_act * act, 1, dtype=weight.dtype, out=grad_row_weight[chunk.rows])
            act.mul_(row_weight[chunk.rows])
            grad_act.mul_(row_weight[chunk.rows])
            for expert, (piece, dy) in zip(chunk.experts, chunk.each(act, spread), strict=True):
                torch.mm(piece.t(), dy, out=grad_down[expert])
            grad_pre = torch.empty_like(hidden[chunk.rows])
            torch.mul(grad_act, silu, out=grad_pre[:, width:])
            torch.ops.aten.silu_backward.grad_input(grad_act.mul_(up), gate, grad_input=grad_pre[:, :width])
            parts = chunk.each(grad_pre, rows, grad_rows[chunk.rows])
            for expert, (piece, row, into) in zip(chunk.experts, parts, strict=True):
                torch.mm(piece.t(), row, out=grad_gate_up[expert])
                torch.mm(piece, gate_up[expert], out=into)

        _run(compute, ctx.counts)
        grad_weight = torch.empty_like(weight)
        grad_weight[plan.order] = grad_row_weight
        return sum_rows(grad_rows, plan), grad_weight, grad_gate_up, grad_down, None


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
    pool = ThreadPoolExecutor(threads, "experts", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)  # the workers' setting is also the default of threads yet to come
    return pool


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("cpu_threads", CPUThreadsOptions, CPUThreadsBackend)]
