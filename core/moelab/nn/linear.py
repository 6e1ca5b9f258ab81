"""nn.Linear whose large fp32 products on a CPU go to oneDNN, which torch uses for bf16 only.

On AMD Zen 4 with 2 threads a layer's forward and backward pass took 0.91 to 0.93 of the time that MKL needs
(benchmarks/cpu_parts.py). The gradient of the weight stays with MKL, which is faster there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moelab.moe.thin_product import few_product, packed

LEAST_FLOPS = 1e8  # of one product; below, nn.Linear is as fast


class Linear(nn.Linear):
    """x [..., D] -> x weight^T + bias, [..., N]."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., D] -> [..., N]."""
        if not prefers_onednn(input, self.out_features) or packed(self.weight) is not None:
            return few_product(input, self.weight, self.bias)
        y: Tensor = _Linear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)


def hooked(module: nn.Module) -> bool:
    """Whether calling it does more than its `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def prefers_onednn(x: Tensor, columns: int) -> bool:
    """Whether the product of x [..., D] with a matrix of D x `columns` is one that `product` computes faster."""
    return (
        2 * x.numel() * columns >= LEAST_FLOPS
        and x.device.type == "cpu"
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
