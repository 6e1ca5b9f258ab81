"""Several small shared experts, each with a gate of its own if wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from moelab import Component, ConfigError, MoEContext, SharedExpert, component, hookimpl
from moelab.nn.mlp import MLP


@dataclass
class SeveralOptions:
    num_experts: int = 2
    intermediate_size: int = MISSING  # of each
    gated: bool = False  # a sigmoid gate for each, as Qwen2-MoE has for its one

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.intermediate_size < 1:
            raise ValueError("num_experts and intermediate_size must be at least 1")


class SeveralSharedExperts(MLP):
    """n feed-forward networks that every token passes through, summed.

    Formula: y = sum_i g_i(x) MLP_i(x), g_i = 1, or sigmoid(W_g x)_i when gated. Stored as one of width n F, neurons of
    expert i at i F .. (i + 1) F: ungated that is the same function. The activation is the model's.
    Source: DeepSeekMoE (2401.06066) 3.2; 2 of width 1408 in DeepSeek-V2-Lite, 4 in Qwen1.5-MoE-A2.7B.
    Use: gates that switch parts of the shared knowledge on and off.
    Cost: 3 D n F parameters (2 D n F without a gate in the activation; and n D), all of them active.
    """

    def __init__(self, options: SeveralOptions, context: MoEContext) -> None:
        if options.gated and context.mlp_bias:
            raise ConfigError("gated: with model.mlp_bias each would need an output bias of its own; write gated=false")
        width = options.num_experts * options.intermediate_size
        super().__init__(context.hidden_size, width, context.activation, context.mlp_bias)
        self.intermediate_size = width
        self.num_experts = options.num_experts
        self.gate = nn.Linear(context.hidden_size, options.num_experts, bias=False) if options.gated else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.gate is None:
            return super().forward(x)
        scaled = self.hidden(x).unflatten(-1, (self.num_experts, -1)) * self.gate(x).sigmoid().unsqueeze(-1)
        out: Tensor = self.down_proj(torch.flatten(scaled, -2))
        return out

    def qwen2_moe_fields(self) -> dict[str, int] | str:
        if self.gate is None or self.num_experts != 1:
            return "it has not the one gated shared expert of Qwen2-MoE"
        return {"shared_expert_intermediate_size": self.intermediate_size}


@hookimpl
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:
    return [component("several", SeveralOptions, SeveralSharedExperts)]
