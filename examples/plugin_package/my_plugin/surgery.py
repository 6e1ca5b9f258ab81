"""A surgery on trained experts: those of the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import (
    Component,
    ConfigError,
    Evidence,
    LayerPlan,
    NewExpert,
    SurgeryContext,
    component,
    hookimpl,
)


@dataclass
class Options:
    num_experts: int = 4  # that stay


class MySurgery:
    """Prune by magnitude: no text is read, so `needs` is empty."""

    needs: frozenset[str] = frozenset()  # of load, together, saliency, knockout, outputs

    def __init__(self, options: Options, context: SurgeryContext) -> None:
        self.layout, self.left = context.layout, options.num_experts
        if not self.layout.num_experts_per_tok <= self.left < self.layout.num_experts:
            raise ConfigError(f"num_experts: {self.left} can't stay of {self.layout.num_experts}")

    def plan(self, evidence: Evidence) -> LayerPlan:
        norms = evidence.read("experts.down").float().flatten(1).norm(dim=1)
        kept = sorted(norms.topk(self.left).indices.tolist())
        experts = tuple(NewExpert((expert,)) for expert in kept)
        width = self.layout.moe_intermediate_size
        return LayerPlan(experts, self.layout.num_experts_per_tok, width, exact=False, because="experts are gone")


@hookimpl
def moelab_surgeries() -> list[Component]:
    return [component("my_surgery", Options, MySurgery)]
