# mypy: allow-untyped-defs, allow-untyped-decorators
"""silu(gate) * up and its gradients, one pass over memory each, in fp32 and rounded once. R rows, W width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelab.derivatives import first_order

BLOCK, WARPS = 1024, 4


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [..., W] of equal shape -> [..., W]."""
    y: Tensor = _Apart.apply(gate.contiguous(), up.contiguous())
    return y


def joined_swiglu(joined: Tensor) -> Tensor:
    """joined [R, 2, W], gate before up -> [R, W]. Its gradient is one tensor too, so that nobody has to join two."""
    y: Tensor = _Joined.apply(joined.contiguous())
    return y


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forth(gate, up).view(gate.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        found = torch.empty_like(gate), torch.empty_like(up)
        _back(gate, up, grads[0].contiguous(), *found)
        return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        return _forth(*joined.unbind(1))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (joined,) = ctx.saved_tensors
        found = torch.empty_like(joined)
        (gate, up), (grad_gate, grad_up) = joined.unbind(1), found.unbind(1)
        _back(gate, up, grads[0].contiguous(), grad_gate, grad_up)
        return found


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """(R, W, stride of a row) of a tensor whose rows lie at equal distances."""
    width = tensor.shape[-1]
    return tensor.numel() // max(width, 1), width, tensor.stride(-2) if tensor.ndim > 1 else width


def _forth(gate: Tensor, up: Tensor) -> Tensor:
    rows, width, stride = _rows(gate)
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if y.numel():
        _forward[rows, triton.cdiv(width, BLOCK)](gate, up, y, width, stride, BLOCK, num_warps=WARPS)
    return y


def _back(gate: Tensor, up: Tensor, dy: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    rows, width, stride = _rows(gate)
    if dy.numel():
        _backward[rows, triton.cdiv(width, BLOCK)](
            gate, up, dy, grad_gate, grad_up, width, stride, BLOCK, num_warps=WARPS
        )


@triton.jit
def _forward(gate, up, y, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, dy, grad_gate, grad_up, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    kind = grad_up.dtype.element_ty
    tl.store(grad_gate + row * stride + column, (upstream * u * (sigmoid + silu * (1 - sigmoid))).to(kind), mask=inside)
    tl.store(grad_up + row * stride + column, (upstream * silu).to(kind), mask=inside)
