"""What a recipe promises of its start, by what its parts say of themselves: nothing is read and nothing computed.

A dense FFN's output can come from the shared expert, from the routed ones, or from both by shares. A shared initialiser
says by `whole` that with its gain it gives all but the routed share of it; an expert initialiser by `keeps_with` beside
which other parts the routed ones give the rest, whichever experts are chosen, and by `nearly_with` beside which they
nearly do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from moelab_upcycling.maker import LayerParts
from moelab_upcycling.plan import Plan


@dataclass(frozen=True)
class PromisedStart:
    """`dense`: its function; `near`: that and routed experts, or nearly that; `far`: another, which may be broken."""

    kind: Literal["dense", "near", "far"]
    sentence: str


def promised_start(plan: Plan, parts: LayerParts) -> PromisedStart:
    """Of one layer's parts; a part that says nothing promises nothing."""
    whole = bool(getattr(parts.shared, "whole", False)) and float(parts.scaling.share) == 0.0
    if whole and plan.recipe.silence == 0:
        return PromisedStart("dense", "the shared expert is the dense FFN and the routed ones are silent")
    keeps_with = getattr(parts.experts, "keeps_with", None)
    names = {axis: str(dict(getattr(plan.recipe, axis))["name"]) for axis in ("shared", "router", "scaling")}
    if keeps_with is not None and plan.recipe.silence is None:
        if _has(names, keeps_with):
            return PromisedStart("dense", "the experts that a token takes make up the dense FFN, whichever they are")
        wanted = ", ".join(f"recipe.{axis}.name={' or '.join(allowed)}" for axis, allowed in keeps_with.items())
        missed = f"; these experts keep it with {wanted}"
    else:
        missed = ""
    nearly = getattr(parts.experts, "nearly_with", None)
    if nearly is not None and plan.recipe.silence is None and _has(names, nearly):
        return PromisedStart("near", "the experts that a token takes are the dense FFN but for a small difference each")
    if whole and not plan.target.norm_topk_prob:
        return PromisedStart(
            "near", "the shared expert is the dense FFN; the routed ones are added with the weight of their top-k mass"
        )
    return PromisedStart(
        "far",
        "this recipe does not keep the dense function: on a trained model of 30 layers such starts were worse than "
        f"uniform, though on a small pilot they seem harmless{missed} (docs/upcycling.md, 'Where it starts')",
    )


def _has(names: Mapping[str, str], wanted: Mapping[str, Collection[str]]) -> bool:
    """Whether the recipe's parts are among those that an initialiser asks for."""
    return all(names[axis] in allowed for axis, allowed in wanted.items())
