"""The dense layer kept in parallel to the experts: residual MoE."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, MoEContext, SharedExpert, component, hookimpl
from moelab.nn.mlp import MLP


@dataclass
class DenseResidualOptions:
    intermediate_size: int | None = None  # null: that of the dense model


class DenseResidual(MLP):
    """A full dense feed-forward layer beside the experts.

    Formula: y = MLP(x) of the dense width, with the model's activation, added to the routed output.
    Source: PR-MoE's residual (2201.05596) 4.1 (section not opened). Snowflake Arctic's hybrid is another: its experts
    read the layer's input before attention and its dense layer what follows it; here both read the same.
    Use: upcycling that keeps the dense model whole, with experts as a correction.
    Cost: 3 D F parameters of the dense F (2 D F without a gate), all of them active.
    """

    def __init__(self, options: DenseResidualOptions, context: MoEContext) -> None:
        width = options.intermediate_size or context.intermediate_size
        super().__init__(context.hidden_size, width, context.activation, context.mlp_bias)
        self.intermediate_size = width

    def qwen2_moe_fields(self) -> str:
        return "its dense layer has no gate, and Qwen2-MoE's shared expert has one"


@hookimpl
def moelab_shared_experts() -> list[Component[MoEContext, SharedExpert | None]]:
    return [component("dense_residual", DenseResidualOptions, DenseResidual)]
