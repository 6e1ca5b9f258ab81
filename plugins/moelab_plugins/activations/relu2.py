"""Squared ReLU between two matrices: Nemotron's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import Pullback


@dataclass
class ReLU2Options:
    pass


class ReLU2:
    """max(up, 0)^2, two matrices.

    Formula: y = down(relu(up x)^2).
    Source: Primer (2109.08668; section not opened); transformers' nemotron_h, `mlp_hidden_act: relu2`, whose routed
    and shared experts have it.
    Use: Nemotron's recipes; sparse neurons.
    Cost: two matrices, 2 D F parameters an expert, two thirds of SwiGLU's of the same width.
    """

    gated = False

    def __init__(self, options: ReLU2Options, context: ActivationContext) -> None:
        pass

    def __call__(self, *inputs: Tensor) -> Tensor:
        act = torch.relu(inputs[0])
        return act * act

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        act = torch.relu(inputs[0])

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            torch.mul(grad, act, out=outs[0]).mul_(2.0)

        return act * act, pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is relu2, two matrices, and its experts have three with SiLU"


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("relu2", ReLU2Options, ReLU2)]
