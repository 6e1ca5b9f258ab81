"""What a config chose, in short: the names, what single layers have instead, and the options that are not defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.hookspecs import EXTENSION_POINTS
from moelab.registry import Registry

SECTION = "model.moe."
POINTS = {point.key.removeprefix(SECTION): point for point in EXTENSION_POINTS if point.key.startswith(SECTION)}
LOSSES, LAYERS = "balance_losses", "layers"
Section = Mapping[str, Any]  # `model.moe` of a stored config


def components(moe: Section | None) -> dict[str, str]:
    """{"router": "softmax_topk", ...}: the names that a config chose; empty for a dense model.

    `layers` is there only where some have other parts, with what is said of them: `0: router hash; 20-27: router
    norm_topk_prob=True`.
    """
    if moe is None:
        return {}
    names = {key: str(moe[key]["name"]) for key in POINTS if key != LOSSES}
    names[LOSSES] = " + ".join(str(node["name"]) for node in moe[LOSSES]) or "none"
    own = [f"{which}: {', '.join(map(_part, parts.items()))}" for which, parts in moe[LAYERS].items()]
    return names | ({LAYERS: "; ".join(own)} if own else {})


def own_options(moe: Section | None, resolved: Any, registry: Registry) -> dict[str, dict[str, Any]]:
    """{"router": {"norm_topk_prob": False}, "balance_losses.0": ...}: options that differ from their plugin's defaults.

    A part at its defaults is left out; what single layers have is in `components`. `resolved`: the MoEConfig that `moe`
    stores, whose values may come from the environment and are not told.
    """
    if moe is None:
        return {}
    pairs = {key: (key, moe[key], getattr(resolved, key)) for key in POINTS if key != LOSSES}
    for index, node in enumerate(moe[LOSSES]):
        pairs[f"{LOSSES}.{index}"] = (LOSSES, node, resolved.balance_losses[index])
    found = {
        path: {option: told[option] for option in registry.differing(POINTS[kind], node)}
        for path, (kind, told, node) in pairs.items()
    }
    return {path: options for path, options in found.items() if options}


def described(options: Mapping[str, Any]) -> str:
    """`a=1, b=x`."""
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _part(item: tuple[str, Mapping[str, Any]]) -> str:
    """("router", {name: hash, seed: 1}) -> `router hash(seed=1)`."""
    kind, node = item
    options = described({key: value for key, value in node.items() if key != "name"})
    if "name" not in node:
        return f"{kind} {options}"
    return f"{kind} {node['name']}({options})" if options else f"{kind} {node['name']}"
