"""Load balance where some choices are no experts: null, zero, copy, constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import layer_mean, probabilities, scores_of, shares, token_mean

KINDS = ("weighted", "average")


@dataclass
class NullLoadBalanceOptions:
    weight: float = 0.01
    kind: str = "weighted"  # weighted (MoE++) or average (AdaMoE)
    tau: float = 0.75  # weighted: how much a choice that is no expert counts

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.tau < 0:
            raise ValueError(f"tau must not be negative, not {self.tau}")


class NullLoadBalance:
    """load_balance over all choices, those that are no experts weighted by tau, or sharing one mean load.

    Formula: E' sum_i n_i f_i P_i over all E' choices, f and P as in load_balance, scope global. weighted: n_i = 1
    for an expert, tau otherwise. average: n_i = 1, and every null choice has the nulls' mean f, so that which null
    was taken does not matter. Balanced, with E experts: (E + tau (E' - E)) / E', or 1.
    Source: weighted: MoE++ (2410.07348) eq. 7; average: AdaMoE (2406.13233) 3.3.
    Use: with moe_plus_plus and null_experts. The smaller tau, the more tokens take choices that cost nothing.
    Cost: as load_balance.
    """

    needs_batch_counts = True

    def __init__(self, options: NullLoadBalanceOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.options = options

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""

        def term(record: LayerRecord) -> Tensor:
            mean = token_mean(probabilities(scores_of(record)), record.routing.token_mask)
            counts = record.wanted if context.batch_counts is None else context.batch_counts[record.layer_id]
            load = shares(counts.to(mean.device)).to(mean.dtype)
            experts = record.routing.num_experts
            if self.options.kind == "average" and load.numel() > experts:
                nulls = load[experts:].mean().expand(load.numel() - experts)
                load = torch.cat([load[:experts], nulls])
            factor = torch.ones_like(mean)
            if self.options.kind == "weighted":
                factor[experts:] = self.options.tau
            return load.numel() * (factor * load * mean).sum()

        return layer_mean(records, term)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("null_load_balance", NullLoadBalanceOptions, NullLoadBalance)]
