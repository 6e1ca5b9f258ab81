"""A factor that gives random subsets of the dense FFN its strength in expectation, at the router's real sharpness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moelab import Component, component, hookimpl
from moelab.initialisers import OutputScaling, UpcycleContext
from moelab_upcycling.neurons import check_choice, check_fraction
from moelab_upcycling.top_k_mass import PLACEMENTS, spread, top_k_mass


@dataclass
class ExpectedMassOptions:
    share: float = 0.5  # of the dense output that the routed experts give; the shared expert gives the rest
    placement: str = "down"  # down and up_down are exact; all: c^(1/3) on all three, which is not
    power_of_two: bool = True  # round the factor, so that scaled copies lose no bit

    def __post_init__(self) -> None:
        check_fraction("share", self.share)
        check_choice("placement", self.placement, PLACEMENTS)


class ExpectedMassScaling:
    """share * F / (expert width * P), P the expected mass of the top K of softmax(N(0, logit_std^2)).

    Not divided by the kept fraction of neurons: that scales the redrawn ones too, and made the start worse.
    """

    def __init__(self, options: ExpectedMassOptions, context: UpcycleContext) -> None:
        self.options, self.share = options, options.share

    def factors(self, context: UpcycleContext, logit_std: float) -> Mapping[str, float]:
        layout = context.layout
        mass = top_k_mass(layout.num_experts, layout.num_experts_per_tok, logit_std, context.norm_topk_prob)
        factor = self.share * context.intermediate_size / (layout.moe_intermediate_size * mass)
        return spread(factor, self.options.placement, self.options.power_of_two)


@hookimpl
def moelab_output_scalings() -> list[Component[UpcycleContext, OutputScaling]]:
    return [component("expected_mass", ExpectedMassOptions, ExpectedMassScaling)]
