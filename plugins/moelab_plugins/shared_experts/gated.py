"""Qwen2-MoE's shared expert, scaled for each token by a learned sigmoid gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torch import Tensor, nn

from moelab import Component, MoEContext, SharedExpert, component, hookimpl
from moelab.moe.thin_product import adder, joined_product, reader
from moelab.nn.linear import hooked
from moelab.nn.mlp import MLP


@dataclass
class GatedOptions:
    intermediate_size: int = MISSING  # 20480 in Qwen2-57B-A14B

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, not {self.intermediate_size}")


class GatedSharedExpert(MLP):
    """One feed-forward network, scaled for each token by a sigmoid gate.

    Formula: y = sigmoid(g x) * W_down act(W_gate x, W_up x), with g [1, D] and the model's activation (SwiGLU in
    Qwen2-MoE); not normalised together with the routed weights.
    Source: Qwen1.5-MoE, Qwen2 report (2407.10671) 2.2.2.
    Use: Qwen2-MoE checkpoints; upcycling, where a gate of zero halves the shared output exactly.
    Cost: 3 D F + D parameters (2 D F + D without a gate in the activation), all of them active.
    """

    def __init__(self, options: GatedOptions, context: MoEContext) -> None:
        super().__init__(context.hidden_size, options.intermediate_size, context.activation, context.mlp_bias)
        self.intermediate_size = options.intermediate_size
        self.gate = nn.Linear(context.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        joined = joined_product(x, self.gate.weight)  # where `reading_input` told of it
        return (self.gate(x) if joined is None else joined).sigmoid() * super().forward(x)

    def serving(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The gate is on the neurons here, not on their sum: the same number but for rounding."""
        plain = type(self).forward is GatedSharedExpert.forward and self.down_proj.bias is None
        neurons, gate = self.neurons_served() if plain else None, reader(self.gate.weight)
        if neurons is None or gate is None:
            return lambda base, x: base + self(x)
        add, serve, opened = adder(self.down_proj.weight), neurons, gate
        return lambda base, x: add(base, serve(x).mul_(opened(x).sigmoid()))

    def reading_input(self) -> tuple[Tensor, ...]:
        found = super().reading_input()
        return (*found, self.gate.weight) if type(self.gate) is nn.Linear and not hooked(self.gate) else found

    def qwen2_moe_fields(self) -> dict[str, Any]:
        return {"shared_expert_intermediate_size": self.intermediate_size}


@hookimpl
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:
    return [component("gated", GatedOptions, GatedSharedExpert)]
