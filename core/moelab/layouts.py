"""From a config alone to the shape of each layer's experts: no model is built and torch is not needed."""

from __future__ import annotations

from moelab.config.model import LARGEST_MATRIX, ModelConfig
from moelab.errors import ConfigError
from moelab.hookspecs import EXPERT_LAYOUTS
from moelab.moe.layout import SIZES, ExpertLayout, LayoutContext, layout_fault
from moelab.moe.per_layer import LayerParts, layer_parts
from moelab.registry import Registry

MOST_EXPERTS = 1 << 20  # of one layer; the most published are "a million" (PEER, 2407.04153, abstract)


def build_layouts(config: ModelConfig, registry: Registry) -> dict[int, ExpertLayout]:
    """{layer: layout} of the sparse layers, from the config alone."""
    if config.moe is None:
        return {}
    layouts = {}
    for layer_id, parts in enumerate(layer_parts(config.moe, config.num_hidden_layers)):
        layout = build_layout(config, registry, parts, layer_id)
        if layout is not None:
            layouts[layer_id] = layout
    return layouts


def build_layout(config: ModelConfig, registry: Registry, parts: LayerParts, layer_id: int) -> ExpertLayout | None:
    """The layout of one layer, None where it stays dense. Raises ConfigError for sizes that can't be."""
    context = LayoutContext(config.hidden_size, config.intermediate_size, layer_id, config.num_hidden_layers)
    where = parts.where("layout")
    layout = registry.build(EXPERT_LAYOUTS, parts.layout, context, where)
    if layout is None:
        return None
    fault = layout_fault(layout)
    if fault is not None:
        chosen, _ = registry.select(EXPERT_LAYOUTS, parts.layout, where)
        raise registry.part(EXPERT_LAYOUTS, parts.layout, where, layer_id).fault(fault, chosen.build)
    for key in SIZES:
        if getattr(layout, key) < 1:
            raise ConfigError(f"{where}.{key}: must be at least 1, not {getattr(layout, key)} (layer {layer_id})")
    if layout.num_experts > MOST_EXPERTS:
        raise ConfigError(f"{where}.num_experts: must be {MOST_EXPERTS} at most, not {layout.num_experts}")
    numbers = 2 * layout.num_experts * layout.moe_intermediate_size * config.hidden_size
    if numbers > LARGEST_MATRIX:
        raise ConfigError(
            f"{where}: {layout.num_experts} experts of moe_intermediate_size {layout.moe_intermediate_size} have "
            f"{numbers} numbers in one bank, more than any machine has (layer {layer_id})"
        )
    if layout.num_experts_per_tok > layout.num_experts:
        raise ConfigError(
            f"{where}.num_experts_per_tok: {layout.num_experts_per_tok} exceeds num_experts {layout.num_experts} "
            f"(layer {layer_id})"
        )
    return layout
