"""Finer experts: each becomes several of a part of its neurons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab import Component, ConfigError, Evidence, LayerPlan, NewExpert, Surgery, SurgeryContext, component, hookimpl
from moelab.seeds import derive_seed
from moelab_plugins.surgeries._counts import NOT_DECLARED, check_top_k

ORDERS = ("contiguous", "random")


@dataclass
class SplitOptions:
    parts: int = 2  # m, of each expert
    order: str = "contiguous"  # which neurons go to which part: contiguous, as they stand, or random
    num_experts_per_tok: int | None = None  # null: parts times what it was, so that the compute stays the same

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise ValueError(f"parts must be at least 2, not {self.parts}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not '{self.order}'")


class Split:
    """m experts of F / m neurons for each one of F, m K for K: the neurons of an expert divided among its parts.

    Exact with m K experts a token on a plain top-K router: an expert's output is a sum over its neurons, so the parts'
    outputs add up to it. They have equal rows and are chosen together. Where the router shares the weight among equals
    (softmax, or normalised weights), sum over parts of (w / m) (m d) is w d: the down projections are multiplied by m,
    in closed form. Where it gives each the whole weight (sigmoids that are not normalised), they stay as they are.
    Source: fine-grained segmentation, DeepSeekMoE (2401.06066, not opened), E to mE and K to mK at the same compute;
    there from scratch. The factor m is that of upcycling by virtual groups (2410.07524), with an expert for the FFN.
    Use: finer routing from a coarse model: parts have different gradients, so their rows part by themselves.
    Cost: the router grows by m, and narrower experts compute less efficiently.
    """

    def __init__(self, options: SplitOptions, context: SurgeryContext) -> None:
        self.options, self.context, layout = options, context, context.layout
        width, parts = layout.moe_intermediate_size, options.parts
        if width % parts:
            raise ConfigError(
                f"parts: {parts} does not divide the {width} neurons of an expert of layer {context.layer_id}"
            )
        self.top_k = check_top_k(
            options.num_experts_per_tok, parts * layout.num_experts_per_tok, parts * layout.num_experts
        )
        self.needs: frozenset[str] = frozenset()

    def plan(self, evidence: Evidence) -> LayerPlan:
        parts, layout = self.options.parts, self.context.layout
        whole = self.context.rows.copies == "whole"
        down, weight = (1.0, 1.0) if whole else (float(parts), 1 / parts)
        experts = [
            NewExpert((expert,), neurons=(part,), copies=parts, down=down, weight=weight)
            for expert in range(layout.num_experts)
            for part in np.split(self._order(expert), parts)
        ]
        width = layout.moe_intermediate_size // parts
        exact, because = True, f"the {parts} parts of an expert are chosen together, and add up to it"
        if self.top_k != parts * layout.num_experts_per_tok:
            exact, because = False, f"{self.top_k} parts are not all parts of {layout.num_experts_per_tok} experts"
        elif self.context.rows.copies is None:
            exact, because = False, NOT_DECLARED
        return LayerPlan(tuple(experts), self.top_k, width, exact, because)

    def _order(self, expert: int) -> np.ndarray:
        width = self.context.layout.moe_intermediate_size
        if self.options.order == "contiguous":
            return np.arange(width)
        seed = derive_seed(self.context.seed, "split", self.context.layer_id, expert)
        return np.random.default_rng(seed).permutation(width)


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("split", SplitOptions, Split)]
