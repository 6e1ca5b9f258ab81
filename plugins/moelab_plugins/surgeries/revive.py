"""Dead experts come back: as copies of the busiest ones, with noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moelab import Component, ConfigError, Evidence, LayerPlan, NewExpert, Surgery, SurgeryContext, component, hookimpl
from moelab_plugins.surgeries._counts import check_experts


@dataclass
class ReviveOptions:
    experts: list[int] = field(default_factory=list)  # that are made anew; empty: those of a load below
    below: float = 0.01  # this share of the mean load
    noise: float = 0.01  # on the weights, in the standard deviation of the matrix
    row_noise: float = 0.1  # on the row of the router, in the standard deviation of the router's matrix

    def __post_init__(self) -> None:
        if not 0 < self.below < 1 or min(self.noise, self.row_noise) < 0:
            raise ValueError("below must lie between 0 and 1, noise and row_noise must not be negative")


class Revive:
    """Each dead expert becomes a copy of a busy one, the n-th of the n-th busiest, with noise on weights and row.

    Not exact: the copy takes a place among the K best wherever its source stands there. Its moments are half of its
    source's gradient: AdamW counts steps of a whole tensor, so moments of zero would not be taken for fresh, and the
    first steps of the new rows would be larger than the learning rate.
    Source: none of the papers that were looked for; growing's copies (amazon-science/expert-upcycling d42f7c6,
    copy_noise at 0.01 of the standard deviation) in the places of experts that learn nothing.
    Use: after a collapse, with a balance loss or a bias that keeps it from coming again.
    Cost: none; the dead experts' own weights are lost.
    """

    def __init__(self, options: ReviveOptions, context: SurgeryContext) -> None:
        self.options, self.context = options, context
        check_experts(options.experts, context)
        if len(options.experts) == context.layout.num_experts:
            raise ConfigError("experts: all of them can't be made anew, for they are made of each other")
        self.needs = frozenset({"load"})

    def plan(self, evidence: Evidence) -> LayerPlan:
        options, layout = self.options, self.context.layout
        load = evidence.measured("load")
        dead = options.experts or np.flatnonzero(load < options.below * load.mean()).tolist()
        alive = [expert for expert in np.argsort(-load, kind="stable").tolist() if expert not in dead]
        source = {expert: alive[place % len(alive)] for place, expert in enumerate(dead)}
        counts = {expert: 1 + list(source.values()).count(expert) for expert in alive}
        experts = []
        for expert in range(layout.num_experts):
            of = source.get(expert, expert)
            noise = (options.noise, options.row_noise) if expert in source else (0.0, 0.0)
            experts.append(NewExpert((of,), (1.0,), None, 1.0, 1 / counts[of], counts[of], *noise))
        because = f"copies of experts {sorted(set(source.values()))} stand in the places of {sorted(source)}"
        if not dead:
            because = "no expert is dead"
        return LayerPlan(tuple(experts), layout.num_experts_per_tok, layout.moe_intermediate_size, not dead, because)


@hookimpl
def moelab_surgeries() -> list[Component[SurgeryContext, Surgery]]:
    return [component("revive", ReviveOptions, Revive)]
