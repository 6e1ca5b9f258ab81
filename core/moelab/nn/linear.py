"""nn.Linear whose large fp32 products on a CPU go to oneDNN, which torch uses for bf16 only.

Forward and backward (benchmarks/cpu_parts.py): where oneDNN's vectors are wider than MKL's (`kernels.onednn`), 0.5 to
0.7 of MKL's time. On AMD's Zen 4 it was 0.91 to 0.93, with the gradient of the weight left to MKL, as elsewhere. A run
may measure which serves its own sizes (`moelab.ways`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelab.kernels.onednn import onednn_is_wider, onednn_serves, outer, prefers_onednn, product
from moelab.moe.thin_product import few_product, is_packed
from moelab.ways import choose, trial

LEAST_CHOICE = 1e7  # FLOPs of one product that is worth measuring
ONEDNN, WHOLLY, MKL = "onednn", "onednn, weights too", "mkl"


class Linear(nn.Linear):
    """x [..., D] -> x weight^T + bias, [..., N]."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., D] -> [..., N]."""
        weight, bias = self.weight, self.bias  # once: a parametrization computes them at every look
        if not is_packed(weight):
            way = _way(input, weight, bias)
            if way != MKL:
                return _by_onednn(input, weight, bias, way == WHOLLY)
        return few_product(input, weight, bias)


def _way(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The fastest one, there and back."""
    usual = _usual(x, weight, bias)
    if 2 * x.numel() * len(weight) < LEAST_CHOICE or not onednn_serves(x, weight, bias):
        return usual
    return choose(
        lambda: f"linear {x.numel() // weight.shape[1]} x {weight.shape[1]} to {len(weight)}",
        usual,
        lambda: {
            WHOLLY: trial(_wholly, x, weight, bias),
            ONEDNN: trial(_by_onednn, x, weight, bias),
            MKL: trial(nn.functional.linear, x, weight, bias),
        },
    )


def _usual(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if not prefers_onednn(x, weight, bias):
        return MKL
    return WHOLLY if onednn_is_wider() else ONEDNN


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, wholly: bool = False) -> Tensor:
    """x [..., D], weight [N, D] -> [..., N]. `wholly`: the gradient of the weight, too."""
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, wholly)
    return y.view(*x.shape[:-1], len(weight))


def _wholly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _by_onednn(x, weight, bias, wholly=True)


def hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Linear(torch.autograd.Function):
    """y = x weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wholly: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wholly = wholly
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative, which oneDNN's products have none of
            found = dy @ weight if needs_x else None, dy.t() @ x if needs_weight else None
            return *found, dy.sum(0) if needs_bias else None, None
        grad_weight = None
        if needs_weight:
            grad_weight = outer(dy, x).contiguous() if ctx.wholly else dy.t() @ x
        return product(dy, weight.t()) if needs_x else None, grad_weight, dy.sum(0) if needs_bias else None, None
