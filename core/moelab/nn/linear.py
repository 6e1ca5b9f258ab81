"""nn.Linear whose large fp32 products on a CPU go to oneDNN, which torch uses for bf16 only.

On AMD Zen 4 with 2 threads a layer's forward and backward pass took 0.91 to 0.93 of the time that MKL needs
(benchmarks/cpu_parts.py). The gradient of the weight stays with MKL, which is faster there. A run may measure which of
the two serves its own sizes (`moelab.ways`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moelab.moe.thin_product import few_product, is_packed
from moelab.ways import choose, trial

LEAST_FLOPS = 1e8  # of one product; below, nn.Linear is as fast
LEAST_CHOICE = 1e7  # FLOPs of one product that is worth measuring
ONEDNN, MKL = "onednn", "mkl"


class Linear(nn.Linear):
    """x [..., D] -> x weight^T + bias, [..., N]."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., D] -> [..., N]."""
        if not is_packed(self.weight) and self._way(input) == ONEDNN:
            return _by_onednn(input, self.weight, self.bias)
        return few_product(input, self.weight, self.bias)

    def _way(self, x: Tensor) -> str:
        """The faster one, there and back."""
        usual = ONEDNN if prefers_onednn(x, self.out_features) else MKL
        if 2 * x.numel() * self.out_features < LEAST_CHOICE or not _can_choose(x):
            return usual
        return choose(
            lambda: f"linear {x.numel() // self.in_features} x {self.in_features} to {self.out_features}",
            usual,
            lambda: {
                ONEDNN: trial(_by_onednn, x, self.weight, self.bias),
                MKL: trial(nn.functional.linear, x, self.weight, self.bias),
            },
        )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., D], weight [N, D] -> [..., N]."""
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def prefers_onednn(x: Tensor, columns: int) -> bool:
    """Whether the product of x [..., D] with a matrix of D x `columns` is one that `product` computes faster."""
    return 2 * x.numel() * columns >= LEAST_FLOPS and _can_choose(x)


def _can_choose(x: Tensor) -> bool:
    """Whether `product` may compute products of x."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D], weight [N, D] -> x weight^T + bias [T, N] by oneDNN. No gradient."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    """y = x weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(dy, weight.t()) if needs_x else None,
            dy.t() @ x if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )
