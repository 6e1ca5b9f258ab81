"""An ungated shared expert: DeepSeek's."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, MoEContext, SharedExpert, component, hookimpl
from moelab.nn.mlp import MLP


@dataclass
class PlainOptions:
    intermediate_size: int = MISSING  # of one shared expert, or of several: n of width F are one of width n F

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, not {self.intermediate_size}")


class PlainSharedExpert(MLP):
    """One feed-forward network that every token passes through.

    Formula: y = W_down act(W_gate x, W_up x) with the model's activation, added to the routed output.
    Source: DeepSeekMoE (2401.06066) 3.2, shared expert isolation.
    Use: knowledge that all tokens need, so that routed experts needn't each learn it.
    Cost: 3 D F parameters (2 D F without a gate), all of them active.
    """

    def __init__(self, options: PlainOptions, context: MoEContext) -> None:
        super().__init__(context.hidden_size, options.intermediate_size, context.activation, context.mlp_bias)
        self.intermediate_size = options.intermediate_size

    def qwen2_moe_fields(self) -> str:
        return "its shared expert has no gate, and Qwen2-MoE's has one"


@hookimpl
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:
    return [component("plain", PlainOptions, PlainSharedExpert)]
