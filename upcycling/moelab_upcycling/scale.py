"""A published recipe's proportions at the width of any source: what a config leaves out follows from them.

Qwen2-57B-A14B was made of Qwen2-7B (Qwen2 report, 2407.10671, section 2.2.2 and table 1): of an FFN of 18944 neurons 64
experts of 2560, 8 for a token, and a shared expert as wide as those 8, 20480. So n h_E is 8.65 times the FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moelab.config.model import ModelConfig
from moelab.config.overlay import overlay
from moelab.config.scalars import settle
from moelab.config.typed import OPTIONS
from moelab.config.upcycle import RecipeConfig, UpcycleConfig
from moelab.errors import ConfigError, near
from moelab.hf.moe_formats import MoEFormat


@dataclass(frozen=True)
class Proportions:
    """Of a published model and the dense one that it was made of."""

    num_experts: int
    num_experts_per_tok: int
    expert_width: int
    dense_width: int
    vocabularies: Mapping[int, int]  # rows of the source -> of the output, where the published model cut padding
    norm_topk_prob: bool


SCALES = {
    "qwen2-57b-a14b": Proportions(
        num_experts=64,
        num_experts_per_tok=8,
        expert_width=2560,
        dense_width=18944,
        vocabularies={152064: 151936},  # Qwen2's tokenizer ends far below; 128 rows of padding are cut
        norm_topk_prob=False,
    )
}
STEP = 8  # expert widths are multiples of it: 16 bytes of bfloat16, which grouped products ask for
# Without a shared expert the published recipe would begin with half of every FFN redrawn; this begins as the source.
WITHOUT_SHARED: dict[str, Any] = {
    "experts": {"name": "virtual_group"},
    "router": {"name": "tied_groups"},
    "scaling": {"name": "virtual_group", "share": 1.0},
}


def scaled(config: UpcycleConfig, source: ModelConfig, kind: MoEFormat) -> tuple[UpcycleConfig, tuple[str, ...]]:
    """(`config` with what `scale` says laid under its own model and recipe, the arithmetic line by line).

    Raises ConfigError for a scale that is unknown, or a number that is none.
    """
    if config.scale is None:
        return config, ()
    if config.scale not in SCALES:
        raise ConfigError(f"scale: no '{config.scale}'{near(config.scale, SCALES)} Known: {', '.join(SCALES)}")
    shape = SCALES[config.scale]
    given = settle(dict(config.model))
    moe = given.get("moe") or {}
    layout, shared = (moe.get(key) or {} for key in ("layout", "shared_expert"))
    told = [f"scale {config.scale}, from the source's FFN of {source.intermediate_size} neurons:"]

    def number(key: str, node: Mapping[str, Any], part: str, value: int, why: str) -> int:
        where = ("model", "moe", part, key)
        found = OPTIONS.convert(node[key], int, where) if key in node else value
        told.append(f"  {part}.{key}: {found}" + (", as given" if key in node else f" = {why}"))
        return found

    experts = number("num_experts", layout, "layout", shape.num_experts, "as published")
    top = number("num_experts_per_tok", layout, "layout", shape.num_experts_per_tok, "as published")
    exact = source.intermediate_size * shape.expert_width / shape.dense_width
    width = number(
        "moe_intermediate_size", layout, "layout", max(STEP, round(exact / STEP) * STEP),
        f"{source.intermediate_size} x {shape.expert_width} / {shape.dense_width} = {exact:.6g}, "
        f"to the nearest multiple of {STEP}",
    )  # fmt: skip
    told.append(
        f"  so {experts} x {width} = {experts * width} neurons, {experts * width / source.intermediate_size:.2f} times "
        f"the FFN (published: {shape.num_experts * shape.expert_width / shape.dense_width:.2f})"
    )
    below: dict[str, Any] = {
        "layout": {
            "name": "uniform", "num_experts": experts, "num_experts_per_tok": top, "moe_intermediate_size": width,
        },
        "router": {"name": "softmax_topk", "norm_topk_prob": shape.norm_topk_prob or not kind.has_shared},
        "shared_expert": {"name": "none"},
    }  # fmt: skip
    if kind.has_shared:
        wide = number("intermediate_size", shared, "shared_expert", top * width, f"{top} experts of {width}")
        below["shared_expert"] = {"name": "gated", "intermediate_size": wide}
    model: dict[str, Any] = {"moe": below}
    rows = shape.vocabularies.get(source.vocab_size, source.vocab_size)
    if "vocab_size" not in given:
        model["vocab_size"] = rows
        cut = (
            f" = {source.vocab_size} - {source.vocab_size - rows} rows of padding" if rows != source.vocab_size else ""
        )
        told.append(f"  vocab_size: {rows}{cut or ', the source has'}")
    recipe = config.recipe
    if not kind.has_shared and recipe == RecipeConfig():
        recipe = replace(recipe, **WITHOUT_SHARED)
        told.append("  recipe: virtual groups, since this target has no shared expert to keep the source's function")
    return replace(config, model=overlay(model, dict(config.model)), recipe=recipe), tuple(told)
