"""The same experts in every sparse layer; which layers are sparse is said as Hugging Face says it."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from moelab import Component, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class UniformOptions:
    num_experts: int = MISSING
    num_experts_per_tok: int = MISSING
    moe_intermediate_size: int = MISSING
    decoder_sparse_step: int = 1  # layer i is sparse when (i + 1) % step == 0 ...
    mlp_only_layers: list[int] = field(default_factory=list)  # ... and i is not listed here

    def __post_init__(self) -> None:
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step must be at least 1, not {self.decoder_sparse_step}")


def uniform(options: UniformOptions, context: LayoutContext) -> ExpertLayout | None:
    """Every sparse layer alike, with `decoder_sparse_step` and `mlp_only_layers`."""
    if context.layer_id in options.mlp_only_layers or (context.layer_id + 1) % options.decoder_sparse_step:
        return None
    return ExpertLayout(options.num_experts, options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("uniform", UniformOptions, uniform)]
