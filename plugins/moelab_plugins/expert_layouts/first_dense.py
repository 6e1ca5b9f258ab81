"""The first layers dense, all others alike: DeepSeek's layout."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class FirstDenseOptions:
    num_experts: int = MISSING
    num_experts_per_tok: int = MISSING
    moe_intermediate_size: int = MISSING
    first_k_dense_replace: int = 1  # how many layers at the bottom stay dense; 3 in DeepSeek-V3

    def __post_init__(self) -> None:
        if self.first_k_dense_replace < 0:
            raise ValueError(f"first_k_dense_replace must not be negative, not {self.first_k_dense_replace}")


def first_dense(options: FirstDenseOptions, context: LayoutContext) -> ExpertLayout | None:
    """Dense up to layer `first_k_dense_replace`, the same experts above.

    Source: DeepSeekMoE (2401.06066) 5.1.2: load balance converges slowest in the first layer.
    Use: deep models whose first router does not settle.
    Cost: none beside the experts that are left out.
    """
    if options.first_k_dense_replace >= context.num_hidden_layers:
        raise ConfigError(
            f"first_k_dense_replace: {options.first_k_dense_replace} leaves none of {context.num_hidden_layers} layers "
            "with experts; for a dense model set model.moe=null"
        )
    if context.layer_id < options.first_k_dense_replace:
        return None
    return ExpertLayout(options.num_experts, options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("first_dense", FirstDenseOptions, first_dense)]
