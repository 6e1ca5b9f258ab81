"""The same experts in every sparse layer; which layers are sparse is said as Hugging Face says it."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


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
    """Every sparse layer alike, with `decoder_sparse_step` and `mlp_only_layers`.

    Source: Qwen2-MoE's config.json; Qwen2-57B-A14B has 64 experts of width 2560, 8 per token, in all 28 layers.
    Use: the default.
    Cost: E * 3 * D * F parameters a layer, K * 3 * D * F of them active.
    """
    for layer_id in options.mlp_only_layers:
        if not 0 <= layer_id < context.num_hidden_layers:
            raise ConfigError(f"mlp_only_layers: {layer_id} is none of the layers 0 .. {context.num_hidden_layers - 1}")
    if context.layer_id in options.mlp_only_layers or (context.layer_id + 1) % options.decoder_sparse_step:
        return None
    return ExpertLayout(options.num_experts, options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("uniform", UniformOptions, uniform)]
