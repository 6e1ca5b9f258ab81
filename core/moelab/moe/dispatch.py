"""Tokens to rows in expert order, and back. One sort; the way back is deterministic.

T tokens, N assignments, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab.moe.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """The N assignments of a routing in expert order; rows of one expert are contiguous, in token order."""

    order: Tensor  # [N] int64: row r is assignment order[r]
    counts: Tensor  # [E] int64: rows of each expert, padding included


def dispatch_plan(routing: Routing) -> Dispatch:
    """Sort the assignments by expert. Stable, so that equal routings give equal bits."""
    order = torch.argsort(routing.expert, stable=True)
    ones = torch.ones_like(routing.expert)
    counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=order.device).index_add_(
        0, routing.expert, ones
    )
    return Dispatch(order, counts)


def gather_rows(x: Tensor, routing: Routing, plan: Dispatch) -> Tensor:
    """x [T, D] -> rows [N, D] in expert order."""
    if routing.top_k is None:
        return x.index_select(0, routing.token.index_select(0, plan.order))
    return _GatherTopK.apply(x, plan.order, routing.top_k)


def combine_rows(rows: Tensor, routing: Routing, plan: Dispatch) -> Tensor:
    """Undo `gather_rows` and mix each token's experts: rows [N, D] in expert order -> [T, D].

    The weight is applied after the down projection, as Hugging Face does, in the dtype of `rows`.
    """
    if routing.top_k is None:
        weighted = rows * routing.weight.index_select(0, plan.order).to(rows.dtype).unsqueeze(-1)
        out = rows.new_zeros(routing.num_tokens, rows.shape[-1])
        return out.index_add_(0, routing.token.index_select(0, plan.order), weighted)
    by_token = _Unpermute.apply(rows, plan.order)  # [T * K, D]
    weighted = by_token * routing.weight.to(rows.dtype).unsqueeze(-1)
    return weighted.view(routing.num_tokens, routing.top_k, rows.shape[-1]).sum(1)


def inverse_permutation(order: Tensor) -> Tensor:
    """order [N] -> inverse [N] with inverse[order[r]] = r."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class _GatherTopK(torch.autograd.Function):
    """rows[r] = x[order[r] // K]. Backward is a gather and a sum over K, where index_add would be atomic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        by_token = grads[0].index_select(0, inverse_permutation(order))
        return by_token.view(-1, ctx.top_k, by_token.shape[-1]).sum(1), None, None


class _Unpermute(torch.autograd.Function):
    """out[order[r]] = rows[r], with a gather both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse_permutation(order))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None
