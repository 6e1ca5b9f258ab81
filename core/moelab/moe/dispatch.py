"""Tokens to rows in expert order, and back. One sort; the way back is a gather and a sum, so it is deterministic.

T tokens, N assignments, E experts, D hidden size. Row r of the expert order is assignment order[r].
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelab.kernels.choice import fused
from moelab.moe.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """The N assignments of a routing in expert order; rows of one expert are contiguous, in token order."""

    order: Tensor  # [N] int64: row r is assignment order[r]
    counts: Tensor  # [E] int64: rows of each expert, padding included
    token: Tensor  # [N] int64: the token of row r
    by_token: Tensor  # [N] int64: the rows again, grouped by their token ...
    starts: Tensor  # [T] int64: ... those of token t begin at starts[t]


def dispatch_plan(routing: Routing) -> Dispatch:
    """Sort the assignments by expert. Stable, so that equal routings give equal bits."""
    order = torch.argsort(routing.expert, stable=True)
    counts = count_ids(routing.expert, routing.num_experts)
    token = routing.token.index_select(0, order)
    by_token = inverse_permutation(order)
    if routing.top_k is not None:
        starts = torch.arange(0, routing.token.numel(), routing.top_k, device=order.device)
    else:
        grouped = torch.argsort(routing.token, stable=True)
        by_token = by_token.index_select(0, grouped)
        per_token = count_ids(routing.token, routing.num_tokens)
        starts = per_token.cumsum(0) - per_token
    return Dispatch(order, counts, token, by_token, starts)


def count_ids(ids: Tensor, limit: int) -> Tensor:
    """How often each of 0 .. limit - 1 stands in ids [N] int64: [limit] int64. Unlike bincount, no host sync."""
    return torch.zeros(limit, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def inverse_permutation(order: Tensor) -> Tensor:
    """order [N] -> inverse [N] with inverse[order[r]] = r."""
    inverse = torch.empty_like(order)
    return inverse.scatter_(0, order, torch.arange(order.numel(), device=order.device))


def gather_rows(x: Tensor, plan: Dispatch) -> Tensor:
    """x [T, D] -> rows [N, D] in expert order."""
    rows: Tensor = _Gather.apply(x, plan)
    return rows


def combine_rows(rows: Tensor, weight: Tensor, plan: Dispatch) -> Tensor:
    """Undo `gather_rows` and mix each token's experts: rows [N, D] in expert order, weight [N] fp32 -> [T, D].

    The weight is applied after the down projection, as Hugging Face does, and in the dtype of `rows`; by our kernels
    in fp32.
    """
    mixed: Tensor = _Combine.apply(rows, weight, plan)
    return mixed


def sum_rows(rows: Tensor, by_token: Tensor, starts: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Each token's sum over its rows [R, D], times row_weight [R] if given -> [T, D]. No gradient.

    by_token [N] int64 lists the rows grouped by token, those of token t from starts[t] on.
    embedding_bag gathers and adds in one pass, with an fp32 accumulator and no atomics.
    """
    if row_weight is None and fused(rows):
        return _kernels().mix(rows, by_token, starts, None, None)
    if by_token.numel() == 0:
        return rows.new_zeros(starts.numel(), rows.shape[-1])
    if row_weight is not None:
        row_weight = row_weight.to(rows.dtype).index_select(0, by_token)
    return torch.nn.functional.embedding_bag(by_token, rows, starts, mode="sum", per_sample_weights=row_weight)


class _Gather(torch.autograd.Function):
    """rows[r] = x[token[r]]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # for a second derivative, which our kernels have none of
            return grads[0].new_zeros(len(ctx.plan.starts), grads[0].shape[1]).index_add(
                0, ctx.plan.token, grads[0]
            ), None
        return sum_rows(grads[0].contiguous(), ctx.plan.by_token, ctx.plan.starts), None


class _Combine(torch.autograd.Function):
    """y[t] = sum over t's rows of weight * row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, plan: Dispatch) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.plan = plan
        if fused(rows):
            return _kernels().mix(rows.contiguous(), plan.by_token, plan.starts, weight.contiguous(), plan.order)
        return sum_rows(rows, plan.by_token, plan.starts, weight.index_select(0, plan.order))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        if fused(rows) and not torch.is_grad_enabled():  # where it is, a second derivative is asked for
            dy = grads[0].contiguous()
            return *_kernels().spread(dy, rows.contiguous(), weight.contiguous(), plan.token, plan.order), None
        spread = grads[0].index_select(0, plan.token)  # [N, D]
        by_row = weight.index_select(0, plan.order).to(rows.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[plan.order] = (spread * rows).sum(-1, dtype=weight.dtype)
        return spread * by_row.unsqueeze(-1), grad_weight, None


def _kernels() -> ModuleType:
    return import_module("moelab.kernels.rows")  # which imports triton: a CPU may lack it
