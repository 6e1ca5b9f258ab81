# mypy: allow-untyped-defs, allow-untyped-decorators
"""Each token's rows summed, and the way back, in one pass over memory each.

T tokens, N rows, D hidden size. torch takes three passes for what `spread` does, and its embedding_bag reads at about
a third of the memory's rate (benchmarks/gpu.py, the profile).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # 16 bytes of bf16 a thread and load


def mix(rows: Tensor, by_token: Tensor, starts: Tensor, weight: Tensor | None, order: Tensor | None) -> Tensor:
    """y[t] = sum of weight * row over t's rows, in fp32, rounded once: rows [N, D] -> [T, D] in their dtype.

    by_token [N] int64 lists the rows grouped by token, those of t from starts[t] (int64 [T]) on. weight [N] belongs to
    the assignments, row r being assignment order[r]; None: 1.
    """
    tokens, width = starts.numel(), rows.shape[1]
    y = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if y.numel():
        _mix[tokens, triton.cdiv(width, BLOCK)](
            rows, by_token, starts, starts if weight is None else weight, starts if order is None else order, y,
            tokens, by_token.numel(), width, rows.stride(0), weight is not None, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y


def spread(dy: Tensor, rows: Tensor, weight: Tensor, token: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `mix` by rows [N, D] and weight [N]: weight * dy[token], and the sum of dy[token] * row."""
    count, width = rows.shape
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    if rows.numel():
        _spread[(count,)](
            dy, rows, weight, token, order, grad_rows, grad_weight,
            width, dy.stride(0), rows.stride(0), BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return grad_rows, grad_weight


@triton.jit
def _mix(
    rows, by_token, starts, weight, order, y, tokens, count, width, stride, weighted: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = tl.load(starts + token)
    end = tl.load(starts + token + 1, mask=token + 1 < tokens, other=count)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(begin, end):
        row = tl.load(by_token + place)
        value = tl.load(rows + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        if weighted:
            value *= tl.load(weight + tl.load(order + row)).to(tl.float32)
        total += value
    tl.store(y + token.to(tl.int64) * width + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _spread(dy, rows, weight, token, order, grad_rows, grad_weight, width, dy_stride, rows_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(token + row)
    assignment = tl.load(order + row)
    factor = tl.load(weight + assignment).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < width
        gradient = tl.load(dy + source * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(rows + row * rows_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += gradient * value
        made = (gradient * factor).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + row * width + column, made, mask=inside)
    tl.store(grad_weight + assignment, tl.sum(total, 0).to(grad_weight.dtype.element_ty))
