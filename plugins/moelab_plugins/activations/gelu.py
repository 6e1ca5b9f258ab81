"""GELU between two matrices: the experts of expert choice, and of most transformers before gates."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Activation, ActivationContext, Component, component, hookimpl
from moelab.moe.activation import Pullback


@dataclass
class GELUOptions:
    approximate: str = "none"  # none: x Phi(x); tanh: the approximation by a hyperbolic tangent

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be none or tanh, not {self.approximate!r}")


class GELU:
    """gelu(up), two matrices.

    Formula: y = down(gelu(up x)), gelu(x) = x Phi(x), or x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
    Source: Hendrycks & Gimpel 2016 (1606.08415); expert choice (2202.09368), eq. 3.
    Use: the recipe of expert choice.
    Cost: two matrices, 2 D F parameters an expert; the function itself is the dearest of all here.
    """

    gated = False

    def __init__(self, options: GELUOptions, context: ActivationContext) -> None:
        self._approximate = options.approximate

    def __call__(self, *inputs: Tensor) -> Tensor:
        with _torchs_own():
            return torch.nn.functional.gelu(inputs[0], approximate=self._approximate)

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        (up,) = inputs

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            with _torchs_own():
                torch.ops.aten.gelu_backward.grad_input(grad, up, approximate=self._approximate, grad_input=outs[0])

        return self(up), pullback

    def qwen2_moe_fields(self) -> str:
        return "model.activation is gelu, two matrices, and its experts have three with SiLU"


def _torchs_own() -> AbstractContextManager[None]:
    """oneDNN keeps a kernel for each number of rows, and experts' are ever new: 95 MB after 400, at half the speed."""
    return nullcontext() if torch.compiler.is_compiling() else torch.backends.mkldnn.flags(enabled=False)


@hookimpl
def moelab_activations() -> list[Component[ActivationContext, Activation]]:
    return [component("gelu", GELUOptions, GELU)]
