"""Experts of different widths in one layer."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class HeterogeneousOptions:
    widths: list[int] = MISSING  # repeated until there are num_experts
    num_experts: int = MISSING
    num_experts_per_tok: int = MISSING

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive, at least one, not {self.widths}")
        if self.num_experts % len(self.widths):
            raise ValueError(f"num_experts {self.num_experts} must be a multiple of the {len(self.widths)} widths")


def heterogeneous(options: HeterogeneousOptions, context: LayoutContext) -> ExpertLayout | None:
    """Wide and narrow experts side by side: expert e has width widths[e mod n].

    Stored at the widest width with all-zero neurons behind, which stay zero: a neuron whose gate, up and down are zero
    has no gradient. So every backend computes them.
    Source: HMoE (2408.10681) 3.
    Use: to let tokens choose how much compute they get; HMoE balances parameters, not counts.
    Cost: computed at the widest width; counted, in parameters and FLOPs, at its own.
    """
    repeats = options.num_experts // len(options.widths)
    return ExpertLayout(
        options.num_experts, options.num_experts_per_tok, max(options.widths), tuple(options.widths) * repeats
    )


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("heterogeneous", HeterogeneousOptions, heterogeneous)]
