"""The clamped SwiGLU of gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import Pullback


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

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        gate = gate.clamp(max=self._limit)
        return (up.clamp(-self._limit, self._limit) + self._offset) * (gate * torch.sigmoid(gate * self._alpha))

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        gate, up = inputs
        clamped = gate.clamp(max=self._limit)
        sigmoid = torch.sigmoid(clamped * self._alpha)
        glu = clamped * sigmoid
        linear = up.clamp(-self._limit, self._limit).add_(self._offset)

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            torch.mul(grad, glu, out=outs[1]).mul_(up.abs() <= self._limit)
            # d glu / d gate = s + alpha glu (1 - s)
            slope = (1.0 - sigmoid).mul_(glu).mul_(self._alpha).add_(sigmoid)
            torch.mul(grad.mul_(linear), slope, out=outs[0]).mul_(gate <= self._limit)

        return linear * glu, pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is clamped_swiglu, and its experts have a plain SwiGLU"


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("clamped_swiglu", ClampedSwiGLUOptions, ClampedSwiGLU)]
