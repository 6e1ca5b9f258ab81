"""An activation: a gate by a hyperbolic tangent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab


@dataclass
class Options:
    slope: float = 1.0  # of the gate at 0


class MyActivation:
    """tanh(slope * gate) * up. Serves experts, shared experts and dense layers; tensors of any equal shape."""

    gated = True  # (gate, up); False: (up) alone, and no gate matrix

    def __init__(self, options: Options, context: moelab.ActivationContext) -> None:
        self.slope = options.slope

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """(gate, up), each [..., F] -> [..., F]; its gradient is autograd's, as it offers no `differentiate`."""
        gate, up = inputs
        return torch.tanh(self.slope * gate) * up


@moelab.hookimpl
def moelab_activations() -> list[moelab.Component]:
    return [moelab.component("my_activation", Options, MyActivation)]
