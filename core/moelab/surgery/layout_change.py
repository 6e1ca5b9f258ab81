"""The config of a checkpoint after surgery: other layouts for some layers, and nothing else.

A layout plugin that has the three numbers among its options keeps its name where they alone say what is wanted;
elsewhere `per_layer` writes every layer out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from moelab.config.model import ModelConfig
from moelab.errors import ConfigError
from moelab.hookspecs import EXPERT_LAYOUTS
from moelab.layouts import build_layouts
from moelab.moe.layout import SIZES, ExpertLayout
from moelab.registry import Registry

WRITTEN_OUT = "per_layer"  # the layout that is a list


def with_layouts(config: ModelConfig, wanted: Mapping[int, ExpertLayout], registry: Registry) -> ModelConfig:
    """The same model with these layouts in its sparse layers, {layer: layout} of all of them.

    Raises ConfigError where no config says that.
    """
    for candidate in (_same_name(config, wanted), _written_out(config, wanted)):
        if candidate is None:
            continue
        try:
            found = build_layouts(candidate, registry)
        except ConfigError:  # options that this plugin's own arithmetic does not take
            continue
        if found == dict(wanted):
            assert candidate.moe is not None
            candidate.moe.layout = registry.resolve(EXPERT_LAYOUTS, candidate.moe.layout, EXPERT_LAYOUTS.key)
            return candidate
    shown = ", ".join(f"{layer}: {layout}" for layer, layout in list(wanted.items())[:2])
    raise ConfigError(f"{EXPERT_LAYOUTS.key}: no layout says what the layers are after the surgery ({shown})")


def _same_name(config: ModelConfig, wanted: Mapping[int, ExpertLayout]) -> ModelConfig | None:
    """The plugin that is there, with the numbers that all layers have."""
    assert config.moe is not None
    if len(set(wanted.values())) != 1 or not set(SIZES) <= config.moe.layout.keys():
        return None
    layout = next(iter(wanted.values()))
    return _with(config, {**config.moe.layout, **{key: getattr(layout, key) for key in SIZES}})


def _written_out(config: ModelConfig, wanted: Mapping[int, ExpertLayout]) -> ModelConfig:
    layers = [wanted.get(layer) for layer in range(config.num_hidden_layers)]
    lists = {key: [0 if layout is None else getattr(layout, key) for layout in layers] for key in SIZES}
    return _with(config, {"name": WRITTEN_OUT, **lists})


def _with(config: ModelConfig, layout: dict[str, Any]) -> ModelConfig:
    """`layout` in place of the model's, and of those of single layers."""
    changed = copy.deepcopy(config)
    assert changed.moe is not None
    changed.moe.layout = layout
    kept = {pattern: {k: v for k, v in parts.items() if k != "layout"} for pattern, parts in changed.moe.layers.items()}
    changed.moe.layers = {pattern: parts for pattern, parts in kept.items() if parts}
    return changed
