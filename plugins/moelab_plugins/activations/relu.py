"""ReLU between two matrices: the experts of GShard and Switch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import Pullback


@dataclass
class ReLUOptions:
    pass


class ReLU:
    """max(up, 0), two matrices.

    Formula: y = down(relu(up x)).
    Source: GShard (2006.16668), algorithm 2; Switch Transformer (2101.03961), whose experts are T5's layer.
    Use: their recipes; sparse neurons.
    Cost: two matrices, 2 D F parameters an expert, two thirds of SwiGLU's of the same width.
    """

    gated = False

    def __init__(self, options: ReLUOptions, context: ActivationContext) -> None:
        pass

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.relu(inputs[0])

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        (up,) = inputs

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            torch.ops.aten.threshold_backward.grad_input(grad, up, 0.0, grad_input=outs[0])

        return torch.relu(up), pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is relu, two matrices, and its experts have three with SiLU"


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("relu", ReLUOptions, ReLU)]
