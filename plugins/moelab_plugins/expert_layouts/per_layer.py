"""Every layer's experts written out."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class PerLayerOptions:
    num_experts: list[int] = MISSING  # one number a layer; 0: dense. A single number serves all layers
    num_experts_per_tok: list[int] = MISSING  # likewise
    moe_intermediate_size: list[int] = MISSING  # likewise


def per_layer(options: PerLayerOptions, context: LayoutContext) -> ExpertLayout | None:
    """A list of counts and widths, one for each layer.

    Source: none; for searches and for checkpoints of pruned models.
    Use: where no rule fits. For other parts than the layout, see model.moe.layers.
    Cost: what it says.
    """
    chosen = []
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        values = getattr(options, key)
        if len(values) not in (1, context.num_hidden_layers):
            raise ConfigError(
                f"{key}: {len(values)} numbers for {context.num_hidden_layers} layers; give one, or one each"
            )
        chosen.append(values[0] if len(values) == 1 else values[context.layer_id])
    return ExpertLayout(*chosen) if chosen[0] else None


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("per_layer", PerLayerOptions, per_layer)]
