"""The clamped SwiGLU of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.derivatives import first_order
from moelab.moe.activation import Pullback

BITS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16,
}  # fmt: skip
PIECE = 1 << 17  # numbers: half a megabyte in float32, of which a few stay in the second-level cache
# On a CPU a mask of booleans costs ten times what this does, which passes what lies within its bounds.
_within = torch.ops.aten.hardtanh_backward.grad_input


@dataclass
class ClampedSwiGLUOptions:
    swiglu_limit: float = 7.0  # the gate is at most so large, the up projection lies within so much of 0
    swiglu_alpha: float = 1.702  # steepness of the sigmoid
    up_offset: float = 1.0  # added to the up projection

    def __post_init__(self) -> None:
        if self.swiglu_limit <= 0:
            raise ValueError(f"swiglu_limit must be positive, not {self.swiglu_limit}")


class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(1.702 gate), with gate and up clamped.

    Formula: g = min(gate x, limit), u = clamp(up x, -limit, limit), y = down((u + offset) * g * sigmoid(alpha g)); what
    is clamped has no gradient.
    Source: gpt-oss (transformers' models/gpt_oss: `GptOssExperts`, `swiglu_limit`, `swiglu_alpha`), with
    `model.mlp_bias: true`, since its experts have biases.
    Use: gpt-oss's recipe; activations that stay in the range of low precision.
    Cost: three matrices, 3 D F parameters an expert, and 2 F + D biases; some element-wise passes more than SwiGLU.
    """

    gated = True

    def __init__(self, options: ClampedSwiGLUOptions, context: ActivationContext) -> None:
        self._limit, self._alpha, self._offset = options.swiglu_limit, options.swiglu_alpha, options.up_offset
        self._beyond = {dtype: _next_above(options.swiglu_limit, dtype) for dtype in BITS}

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        gate = gate.clamp(-torch.inf, self._limit)  # both bounds: half the time of one
        if torch.is_grad_enabled():
            return (up.clamp(-self._limit, self._limit) + self._offset) * (gate * torch.sigmoid(gate * self._alpha))
        sigmoid = gate.mul(self._alpha).sigmoid_()
        return up.clamp(-self._limit, self._limit).add_(self._offset).mul_(gate.mul_(sigmoid))

    def of_joined(self, joined: Tensor) -> Tensor | None:
        if joined.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        beyond = self._beyond[joined.dtype]
        out: Tensor = _InPieces.apply(joined, _Constants(self._limit, self._alpha, self._offset, beyond))
        return out

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        gate, up = inputs
        clamped = gate.clamp(-torch.inf, self._limit)
        scaled = clamped * self._alpha
        sigmoid = torch.sigmoid(scaled)
        glu = clamped.mul_(sigmoid)
        beyond = self._beyond[gate.dtype]
        linear = up.clamp(-self._limit, self._limit).add_(self._offset)

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            _within(grad * glu, up, -beyond, beyond, grad_input=outs[1])
            # d glu / d gate = s + alpha g s (1 - s)
            slope = torch.ops.aten.sigmoid_backward(scaled, sigmoid).add_(sigmoid)
            _within(grad.mul_(linear).mul_(slope), gate, -torch.inf, beyond, grad_input=outs[0])

        return linear * glu, pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is clamped_swiglu, and its experts have a plain SwiGLU"


class _Constants(NamedTuple):
    limit: float
    alpha: float
    offset: float
    beyond: float  # the least number above the limit


class _InPieces(torch.autograd.Function):
    """joined [R, 2, W] -> [R, W], on a CPU: all passes over a piece while it is in cache, gradients in place."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, constants: _Constants) -> Tensor:
        limit, alpha, offset, _ = constants
        out = joined.new_empty(joined.shape[0], joined.shape[2])
        sigmoids = torch.empty_like(out)
        for rows in _pieces(joined):
            gate, up = joined[rows].unbind(1)
            glu = torch.clamp(gate, -torch.inf, limit, out=out[rows])  # both bounds: half the time of one
            glu.mul_(torch.mul(glu, alpha, out=sigmoids[rows]).sigmoid_())
            glu.mul_(up.clamp(-limit, limit).add_(offset))
        ctx.save_for_backward(joined, sigmoids)
        ctx.constants = constants
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joined, sigmoids = ctx.saved_tensors
        limit, alpha, offset, beyond = ctx.constants
        found = torch.empty_like(joined)
        for rows in _pieces(joined):
            (gate, up), outs, sigmoid = joined[rows].unbind(1), found[rows].unbind(1), sigmoids[rows]
            clamped, grad = gate.clamp(-torch.inf, limit), grads[0][rows]
            _within(clamped.mul(sigmoid).mul_(grad), up, -beyond, beyond, grad_input=outs[1])
            # d glu / d gate = s + alpha g s (1 - s)
            slope = torch.ops.aten.sigmoid_backward(clamped.mul_(alpha), sigmoid).add_(sigmoid)
            linear = up.clamp(-limit, limit).add_(offset).mul_(grad)
            _within(linear.mul_(slope), gate, -torch.inf, beyond, grad_input=outs[0])
        return found, None


def _pieces(joined: Tensor) -> Iterator[slice]:
    """Rows of at most PIECE numbers each of gate and up."""
    step = max(1, PIECE // max(1, joined.shape[2]))
    for first in range(0, joined.shape[0], step):
        yield slice(first, first + step)


def _next_above(limit: float, dtype: torch.dtype) -> float:
    """The least number of a format above the limit as that format rounds it: what lies below has a gradient."""
    rounded = torch.tensor(limit, dtype=dtype, device="cpu")
    return (rounded.view(BITS[dtype]) + 1).view(dtype).item()  # of positive numbers the next in their bits


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("clamped_swiglu", ClampedSwiGLUOptions, ClampedSwiGLU)]
