"""An expert layout: as many experts in each layer as the layer's depth allows."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class Options:
    num_experts: int = 8  # of the deepest layer
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok: must be 1 .. num_experts, not {self.num_experts_per_tok}")


def my_expert_layout(options: Options, context: LayoutContext) -> ExpertLayout | None:
    """Experts rise linearly with depth, from num_experts_per_tok in the first layer; None would be a dense layer."""
    deepest = max(context.num_hidden_layers - 1, 1)
    extra = (options.num_experts - options.num_experts_per_tok) * context.layer_id // deepest
    return ExpertLayout(options.num_experts_per_tok + extra, options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component]:
    return [component("my_expert_layout", Options, my_expert_layout)]
