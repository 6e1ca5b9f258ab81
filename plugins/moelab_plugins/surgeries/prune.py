"""Fewer experts: those that matter least go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moelab import Component, ConfigError, Evidence, LayerPlan, NewExpert, Surgery, SurgeryContext, component, hookimpl
from moelab_plugins.surgeries._counts import check_experts, check_top_k

BY = {"load": "load", "reap": "saliency", "knockout": "knockout"}  # option -> what is measured


@dataclass
class PruneOptions:
    num_experts: int | None = None  # that stay; or name those that go:
    experts: list[int] = field(default_factory=list)  # that go
    by: str = "reap"  # the lowest go: reap, load, or knockout (the loss that removing each one costs: E more passes)
    num_experts_per_tok: int | None = None  # null: as it is

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, not '{self.by}'")
        if (self.num_experts is None) == (not self.experts):
            raise ValueError("give num_experts, how many stay, or experts, which go")


class Prune:
    """The experts of the lowest score go, with their rows of the router; the others stay to the bit, moments too.

    Not exact: tokens of a pruned expert go to the next best, and a softmax over all experts gives its weight to the
    rest. Exact on a text that never chose it where weights are normalised over the chosen ones, or are sigmoids.

    Formula: reap: S_j = mean over the tokens routed to j of w_j |E_j(x)|, with the weights as the layer multiplies by
    them; an expert that no token chose scores 0. load: the number of such tokens. knockout: the loss without j, the
    other weights of its tokens scaled to the same sum, less the loss.
    Source: REAP (2510.13999, abstract opened; formula from its code, CerebrasResearch/reap 1970473,
    pruning_metrics.py). Departure: that code's weights are of a softmax over all experts, normalised or not by an
    option, whatever the model does; here they are the model's own.
    Use: less memory at the same compute; REAP's authors find it better than merging for generation.
    Cost: one pass over text for the scores, and for knockout one for every expert.
    """

    def __init__(self, options: PruneOptions, context: SurgeryContext) -> None:
        self.options, self.context, count = options, context, context.layout.num_experts
        check_experts(options.experts, context)
        self.left = count - len(options.experts) if options.num_experts is None else options.num_experts
        if not 1 <= self.left < count:
            raise ConfigError(f"num_experts: {self.left} of {count} experts stay; give 1 .. {count - 1}")
        self.top_k = check_top_k(options.num_experts_per_tok, context.layout.num_experts_per_tok, self.left)
        self.needs = frozenset() if options.experts else frozenset({BY[options.by]})

    def plan(self, evidence: Evidence) -> LayerPlan:
        layout = self.context.layout
        goes = set(self.options.experts) or self._lowest(evidence)
        experts = tuple(NewExpert((expert,)) for expert in range(layout.num_experts) if expert not in goes)
        because = f"the tokens of experts {', '.join(map(str, sorted(goes)))}, which go, are others' now"
        return LayerPlan(experts, self.top_k, layout.moe_intermediate_size, False, because)

    def _lowest(self, evidence: Evidence) -> set[int]:
        scores = evidence.measured(BY[self.options.by])
        return set(np.argsort(scores, kind="stable")[: len(scores) - self.left].tolist())


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("prune", PruneOptions, Prune)]
