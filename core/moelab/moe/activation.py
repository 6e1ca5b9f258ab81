"""What stands between the matrices of a feed-forward layer: the contract of activations, and SwiGLU.

One choice, `model.activation`, serves routed experts, shared experts and dense layers, as in the published models.
F width; every function here takes tensors of any equal shape, [..., F] at the usual place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moelab.kernels.choice import fused

# (gradient of the result, which it may overwrite; for each input where to write its gradient) -> None
Pullback = Callable[..., None]


@dataclass(frozen=True)
class ActivationContext:
    """What an activation may depend on when it is built; one for each decoder layer."""

    hidden_size: int
    layer_id: int
    num_hidden_layers: int


@runtime_checkable
class Activation(Protocol):
    """`(gate, up) -> [..., F]` where it is gated, else `(up) -> [..., F]`: down(activation(gate x, up x)).

    Each neuron by itself, without parameters or noise, and 0 where its inputs are 0: so experts of unlike widths stand
    in one bank, and any layout of the neurons (rows, blocks) gives the same. The result is a tensor of its own.

    Optional, looked up by name:
    - `differentiate(*inputs) -> (result, pullback)`: `pullback(grad, *outs)` writes the inputs' gradients into `outs`
      and may overwrite `grad`, the caller may overwrite `result`. Without autograd, for backends that compute their own
      backward pass; without this, autograd serves them, with one more copy of the result.
    - `of_joined(joined [R, 2, W]) -> [R, W]`: the same of gate and up that stand beside each other in one contiguous
      tensor, where it has a faster way for tensors like that, else None: saves a copy of both gradients.
    - `qwen2_moe_fields() -> dict | str`: `hidden_act` in Hugging Face's config.json, or why it has none.
    """

    gated: bool  # two inputs and three matrices, else one and two

    def __call__(self, *inputs: Tensor) -> Tensor: ...


class SwiGLU:
    """silu(gate) * up (Shazeer 2020, 2002.05202): the activation of Qwen2 and its kin."""

    gated = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        if fused(gate) and gate.dtype == up.dtype:
            act: Tensor = _kernels().swiglu(gate, up)
            return act
        act = torch.nn.functional.silu(gate)
        return act * up if torch.is_grad_enabled() else act.mul_(up)

    def of_joined(self, joined: Tensor) -> Tensor | None:
        return _kernels().joined_swiglu(joined) if fused(joined) else None

    def differentiate(self, *inputs: Tensor) -> tuple[Tensor, Pullback]:
        gate, up = inputs
        silu = torch.nn.functional.silu(gate)

        def pullback(grad: Tensor, *outs: Tensor) -> None:
            torch.mul(grad, silu, out=outs[1])
            torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=outs[0])

        return silu * up, pullback

    def qwen2_moe_fields(self) -> dict[str, Any]:
        return {"hidden_act": "silu"}


def num_inputs(activation: Activation) -> int:
    """Matrices that read x: gate and up, or up alone."""
    return 2 if activation.gated else 1


def num_matrices(activation: Activation) -> int:
    """Of a feed-forward layer, `down` among them."""
    return num_inputs(activation) + 1


def activate(activation: Activation, joined: Tensor) -> Tensor:
    """joined [R, M, W], its M inputs beside each other -> [R, W]."""
    own = getattr(activation, "of_joined", None)
    found: Tensor | None = None if own is None else own(joined)
    return activation(*joined.unbind(1)) if found is None else found


def differentiate(activation: Activation, *inputs: Tensor) -> tuple[Tensor, Pullback]:
    """(result, pullback) as the activation itself computes them, or by autograd; inside a backward pass too."""
    own = getattr(activation, "differentiate", None)
    if own is not None:
        found: tuple[Tensor, Pullback] = own(*inputs)
        return found
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        result = activation(*leaves)

    def pullback(grad: Tensor, *outs: Tensor) -> None:
        for out, gradient in zip(outs, torch.autograd.grad(result, leaves, grad), strict=True):
            out.copy_(gradient)

    return result.detach().clone(), pullback  # a clone: what autograd saved must not be overwritten


def _kernels() -> ModuleType:
    return import_module("moelab.kernels.swiglu")  # which imports triton: a CPU may lack it
