"""SiTU-GLU, Kimi K3's: a SwiGLU both of whose factors are softly capped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import Pullback


@dataclass
class SiTUGLUOptions:
    gate_cap: float = 4.0  # beta_1 of Kimi K3
    up_cap: float = 25.0  # beta_2

    def __post_init__(self) -> None:
        if min(self.gate_cap, self.up_cap) <= 0:
            raise ValueError(f"gate_cap and up_cap must be positive, not {self.gate_cap} and {self.up_cap}")


class SiTUGLU:
    """b1 tanh(gate / b1) sigmoid(gate) * b2 tanh(up / b2).

    Formula: y = down([b1 tanh(g / b1) * sigmoid(g)] * [b2 tanh(u / b2)]), g = gate x, u = up x; near 0 SwiGLU's, and at
    most b1 b2 in size.
    Source: Kimi K3 (2607.24653) 2.3, "Sigmoid Tanh Unit GLU"; its dense layer and shared experts have it too.
    Use: K3's recipe; many sparse experts whose activations would grow without bound.
    Cost: three matrices, 3 D F parameters an expert; two hyperbolic tangents a neuron more than SwiGLU.
    """

    gated = True

    def __init__(self, options: SiTUGLUOptions, context: ActivationContext) -> None:
        self._gate_cap, self._up_cap = options.gate_cap, options.up_cap

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        if torch.is_grad_enabled():
            capped = torch.tanh(gate * (1.0 / self._gate_cap)) * torch.sigmoid(gate)
            return capped * torch.tanh(up * (1.0 / self._up_cap)) * (self._gate_cap * self._up_cap)
        capped = gate.mul(1.0 / self._gate_cap).tanh_().mul_(torch.sigmoid(gate))
        return capped.mul_(up.mul(1.0 / self._up_cap).tanh_()).mul_(self._gate_cap * self._up_cap)

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        gate, up = inputs
        gate_tanh, up_tanh = gate.mul(1.0 / self._gate_cap).tanh_(), up.mul(1.0 / self._up_cap).tanh_()
        sigmoid = torch.sigmoid(gate)
        capped_gate, capped_up = gate_tanh * self._gate_cap, up_tanh * self._up_cap
        swish = capped_gate * sigmoid

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            torch.ops.aten.tanh_backward.grad_input(grad * swish, up_tanh, grad_input=outs[1])
            # d swish / d gate = s (1 - t^2) + b1 t s (1 - s)
            slope = torch.ops.aten.sigmoid_backward(capped_gate, sigmoid)
            slope.add_(torch.ops.aten.tanh_backward(sigmoid, gate_tanh))
            torch.mul(grad.mul_(capped_up), slope, out=outs[0])

        return swish * capped_up, pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is situ_glu, and its experts have a plain SwiGLU"


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("situ_glu", SiTUGLUOptions, SiTUGLU)]
