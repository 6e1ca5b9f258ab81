"""What `moelab ablate` is asked to change, from its options: named counterfactuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moelab.errors import ConfigError
from moelab.moe.block import MoEBlock
from moelab.moe.overrides import NextBest, RemoveAll, Sampled
from moelab.moe.routing import RoutingOverride
from moelab.nn.transformer import Transformer
from moelab.routes.counterfactuals import Counterfactual, by_layer, removal
from moelab.routes.replay import Replay
from moelab.routes.trace import Trace

RENORMALISE, DROP, BOTH = "renormalise", "drop", "both"
SWAPS: dict[str, tuple[RoutingOverride, str]] = {
    "nearest": (NextBest(1), "next best, last slot"),
    "next-best": (NextBest(), "next best, all slots"),
    "random": (Sampled(), "random experts"),
}
Experts = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Asked:
    """One counterfactual with its name."""

    label: str
    counterfactual: Counterfactual
    kind: str  # remove, silence, swap
    experts: Experts | None = None  # of a removal
    rest: str = ""  # of a removal: what becomes of the token's other weights


def layers_of(model: Transformer) -> dict[int, int]:
    """{MoE layer: number of experts}."""
    found = {b.layer_id: b.layout.num_experts for b in model.modules() if isinstance(b, MoEBlock)}
    if not found:
        raise ConfigError("the model has no MoE layer, so there is nothing to remove; give a model with `model.moe`")
    return found


def removals(wanted: Sequence[str], layers: Mapping[int, int], rest: str) -> list[Asked]:
    """`all`: each expert, and each layer's whole routing; `LAYER`; `LAYER:EXPERT[,LAYER:EXPERT...]`, together.

    The experts of a set are also removed one by one, so that what they cost together can be told from the sum.
    """
    sets: list[dict[int, tuple[int, ...]]] = []
    silenced: list[int] = []
    for text in wanted:
        if text == "all":
            silenced += layers
            sets += [{layer: (expert,)} for layer, experts in layers.items() for expert in range(experts)]
        elif _is_number(text):
            silenced.append(_layer(text, text, layers))
        else:
            together = _experts(text, layers)
            sets.append(together)
            sets += [{layer: (expert,)} for layer, mine in together.items() for expert in mine]
    found = [
        Asked(f"layer {layer}, all", by_layer({layer: RemoveAll()}), "silence") for layer in dict.fromkeys(silenced)
    ]
    distinct = list({tuple(sorted(one.items())): one for one in sets}.values())
    for way in (RENORMALISE, DROP) if rest == BOTH else (rest,):
        suffix = ", dropped" if way == DROP and rest == BOTH else ""
        found += [
            Asked(_named(one) + suffix, removal(one, renormalise=way == RENORMALISE), "remove", one, way)
            for one in distinct
        ]
    return found


def swaps(wanted: Sequence[str], layers: Mapping[int, int], seed: int, traces: Mapping[str, Trace]) -> list[Asked]:
    """Other experts at equal compute: in each layer alone, and in all of them."""
    found = []
    for text in wanted:
        if text in traces:
            found += _replays(Path(text).name, traces[text], list(layers))
            continue
        override, told = SWAPS[text]
        one = Sampled(seed) if isinstance(override, Sampled) else override
        for changed in [[layer] for layer in layers] + ([list(layers)] if len(layers) > 1 else []):
            name = "all layers" if len(changed) > 1 else f"layer {changed[0]}"
            found.append(Asked(f"{name}, {told}", by_layer(dict.fromkeys(changed, one)), "swap"))
    return found


def _replays(name: str, trace: Trace, layers: list[int]) -> list[Asked]:
    found = []
    for changed in [[layer] for layer in layers] + ([layers] if len(layers) > 1 else []):
        where = "all layers" if len(changed) > 1 else f"layer {changed[0]}"
        found.append(Asked(f"{where}, routes of {name}", _replay(trace, tuple(changed)), "swap"))
    return found


def _replay(trace: Trace, layers: tuple[int, ...]) -> Counterfactual:
    def override(first: int, count: int) -> RoutingOverride:
        return by_layer(dict.fromkeys(layers, Replay(trace, first, count))).override(first, count)

    return Counterfactual(layers, override)


def _named(experts: Experts) -> str:
    parts = [
        f"layer {layer}, expert{'s' * (len(mine) > 1)} {' '.join(map(str, mine))}" for layer, mine in experts.items()
    ]
    return " + ".join(parts)


def _experts(text: str, layers: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for part in text.split(","):
        layer_text, colon, expert_text = part.partition(":")
        if not colon or not _is_number(expert_text):
            raise ConfigError(f"--remove {text}: '{part}' is no LAYER:EXPERT; write all, 3, 3:7 or 3:7,3:9")
        layer = _layer(layer_text, text, layers)
        if int(expert_text) >= layers[layer]:
            raise ConfigError(f"--remove {text}: layer {layer} has experts 0 to {layers[layer] - 1}")
        found[layer] = tuple(sorted({*found.get(layer, ()), int(expert_text)}))
    return dict(sorted(found.items()))


def _layer(text: str, whole: str, layers: Mapping[int, int]) -> int:
    if not _is_number(text) or int(text) not in layers:
        raise ConfigError(f"--remove {whole}: '{text}' is no MoE layer; there are {', '.join(map(str, layers))}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
