"""The weight scaling of virtual groups (He et al. 2024, 2410.07524, section 3): as if all router weights were equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moelab import Component, component, hookimpl
from moelab.initialisers import OutputScaling, UpcycleContext
from moelab_upcycling.neurons import check_choice, check_fraction
from moelab_upcycling.top_k_mass import PLACEMENTS, spread


@dataclass
class VirtualGroupScalingOptions:
    share: float = 0.5  # of the dense output that the routed experts give; the shared expert gives the rest
    placement: str = "down"  # down and up_down are exact; all: the paper's c^(1/3) on all three, which is not
    power_of_two: bool = False  # round the factor, so that scaled copies lose no bit

    def __post_init__(self) -> None:
        check_fraction("share", self.share)
        check_choice("placement", self.placement, PLACEMENTS)


class VirtualGroupScaling:
    """share * G with weights that sum to one, share * E G / K with softmax over all experts; G experts make an FFN."""

    def __init__(self, options: VirtualGroupScalingOptions, context: UpcycleContext) -> None:
        self.options, self.share = options, options.share

    def factors(self, context: UpcycleContext, logit_std: float) -> Mapping[str, float]:
        layout = context.layout
        group = -(-context.intermediate_size // layout.moe_intermediate_size)
        factor = self.share * group
        if not context.norm_topk_prob:
            factor *= layout.num_experts / layout.num_experts_per_tok
        return spread(factor, self.options.placement, self.options.power_of_two)


@hookimpl
def moelab_output_scalings() -> list[Component[UpcycleContext, OutputScaling]]:
    return [component("virtual_group", VirtualGroupScalingOptions, VirtualGroupScaling)]
