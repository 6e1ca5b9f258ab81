"""Another number of experts for each token."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, Evidence, LayerPlan, NewExpert, Surgery, SurgeryContext, component, hookimpl
from moelab_plugins.surgeries._counts import check_top_k


@dataclass
class TopKOptions:
    num_experts_per_tok: int = MISSING  # after it


class TopK:
    """Another K; no weight changes.

    Not exact: a token has other experts, and where weights are not normalised another sum of them. (With normalised
    weights and equal experts in the places that are added, it would be.)
    Source: none; that K can be lowered after training is what the recorder's top-K margin is for (docs/metrics.md).
    Use: less compute a token, or more; train on from it.
    Cost: compute in proportion to K.
    """

    def __init__(self, options: TopKOptions, context: SurgeryContext) -> None:
        self.layout = context.layout
        self.top_k = check_top_k(options.num_experts_per_tok, 0, self.layout.num_experts)
        if self.top_k == self.layout.num_experts_per_tok:
            raise ConfigError(f"num_experts_per_tok: layer {context.layer_id} has {self.top_k} already")
        self.needs: frozenset[str] = frozenset()

    def plan(self, evidence: Evidence) -> LayerPlan:
        experts = tuple(NewExpert((expert,)) for expert in range(self.layout.num_experts))
        because = f"a token has {self.top_k} experts where it had {self.layout.num_experts_per_tok}"
        return LayerPlan(experts, self.top_k, self.layout.moe_intermediate_size, False, because)


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("top_k", TopKOptions, TopK)]
