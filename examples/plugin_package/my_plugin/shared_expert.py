"""A shared expert: a feed-forward network of a share of the experts' width."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab
from moelab.nn.mlp import MLP


@dataclass
class Options:
    share: float = 0.5  # of moe_intermediate_size

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ValueError(f"share: must be positive, not {self.share}")


class MySharedExpert(torch.nn.Module):
    """A feed-forward network that every token passes through; its output is added to the routed one.

    T tokens, D hidden size.
    """

    def __init__(self, options: Options, context: moelab.MoEContext) -> None:
        super().__init__()
        self.intermediate_size = max(1, round(options.share * context.moe_intermediate_size))
        self.mlp = MLP(context.hidden_size, self.intermediate_size, context.activation, context.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, D] -> [T, D]."""
        return self.mlp(x)


@moelab.hookimpl
def moelab_shared_experts() -> list[moelab.Component]:
    return [moelab.component("my_shared_expert", Options, MySharedExpert)]
