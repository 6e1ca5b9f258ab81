"""Which parts each layer has: the MoE config, overridden by layer patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moelab.config.model import MoEConfig, Part
from moelab.config.overlay import overlay
from moelab.errors import ConfigError, near

_PIECE = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?(?:/(\d{1,9}))?")
LAYER_KEYS = ("layout", "router", "shared_expert", "backend")


@dataclass(frozen=True)
class LayerParts:
    """What one layer is built from, and where in the config that was said, for messages."""

    layout: Part
    router: Part
    shared_expert: Part
    backend: Part
    pattern: str | None = None  # the key of `model.moe.layers` that applies

    def where(self, part: str) -> str:
        base = "model.moe"
        return f"{base}.{part}" if self.pattern is None else f'{base}.layers."{self.pattern}".{part}'


def layer_parts(moe: MoEConfig, num_hidden_layers: int) -> list[LayerParts]:
    """One entry a layer. Patterns as `match_layers` reads them; two that meet are an error."""
    base: dict[str, Part] = {key: getattr(moe, key) for key in LAYER_KEYS}
    chosen: dict[int, tuple[str, dict[str, Any]]] = {}
    for pattern, override in moe.layers.items():
        where = f'model.moe.layers."{pattern}"'
        for key in override:
            if key not in LAYER_KEYS:
                raise ConfigError(
                    f"{where}.{key}: no such part{near(key, LAYER_KEYS)} It takes: {', '.join(LAYER_KEYS)}"
                )
        for layer_id in match_layers(str(pattern), num_hidden_layers, where):
            if layer_id in chosen:
                raise ConfigError(f'{where}: layer {layer_id} is already matched by "{chosen[layer_id][0]}"')
            chosen[layer_id] = (str(pattern), override)
    parts: list[LayerParts] = []
    for layer_id in range(num_hidden_layers):
        applied = chosen.get(layer_id)
        override = applied[1] if applied else {}
        merged = overlay(base, override)
        parts.append(LayerParts(**{key: merged[key] for key in LAYER_KEYS}, pattern=applied[0] if applied else None))
    return parts


def match_layers(pattern: str, num_hidden_layers: int, where: str) -> list[int]:
    """The layers that "3", "20-27", "20-" (to the last), "0-27/2" (every second) or "0,2-4" names, in its order.

    Raises ConfigError for what is no pattern, matches nothing, or names a layer twice.
    """
    found: list[int] = []
    for piece in pattern.split(","):
        match = _PIECE.fullmatch(piece.strip())
        if match is None:
            raise ConfigError(f'{where}: not a layer pattern; write "3", "20-27", "20-", "0-27/2" or "0,2-4"')
        first, dash, last, step = match.groups()
        end = int(last) if last else num_hidden_layers - 1 if dash else int(first)
        found += range(int(first), end + 1, max(int(step or 1), 1))
    if not found or max(found) >= num_hidden_layers:
        raise ConfigError(f"{where}: the model has layers 0 .. {num_hidden_layers - 1}")
    twice = sorted({layer for layer in found if found.count(layer) > 1})
    if twice:
        raise ConfigError(f"{where}: names layer {twice[0]} twice")
    return found
