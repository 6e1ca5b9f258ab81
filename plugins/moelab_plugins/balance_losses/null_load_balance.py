"""Load balance where some choices are no experts: null, zero, copy, constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import batch_counts, layer_mean, probabilities, scores_of, shares, token_mean

KINDS = ("weighted", "average")
CONVENTIONS = ("moelab", "moe_plus_plus")


@dataclass
class NullLoadBalanceOptions:
    weight: float = 0.01  # in units of `convention`; MoE++'s beta is 0.01 in its own
    convention: str = "moelab"  # moelab: E' sum n f P, f summing to 1; moe_plus_plus: sum n f P, f summing to K (eq. 7)
    kind: str = "weighted"  # weighted (MoE++) or average (AdaMoE)
    tau: float = 0.75  # weighted: how much a choice that is no expert counts

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, not '{self.convention}'")
        if self.tau < 0:
            raise ValueError(f"tau must not be negative, not {self.tau}")


class NullLoadBalance:
    """load_balance over all choices, those that are no experts weighted by tau, or sharing one mean load.

    Formula: E' sum_i n_i f_i P_i over all E' choices, f and P as in load_balance, scope global. weighted: n_i = 1
    for an expert, tau otherwise. average: n_i = 1, and every null choice has the nulls' mean f, so that which null
    was taken does not matter. Balanced, with E experts: (E + tau (E' - E)) / E', or 1. MoE++'s own value has no E' in
    front and an f that sums to K, so it is K / E' of that: 6 times less for 8 + 4 experts and K = 2.
    Source: weighted: MoE++ (2410.07348) eq. 7, which is silent on layers (here their mean); average: AdaMoE
    (2406.13233) 3.3 (section not opened; its code's exp_1).
    Use: with moe_plus_plus and null_experts. The smaller tau, the more tokens take choices that cost nothing.
    Cost: as load_balance.
    """

    needs_batch_counts = True

    def __init__(self, options: NullLoadBalanceOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.options = options
        self.top_k = {layer: layout.num_experts_per_tok for layer, layout in context.layouts.items()}

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""

        def term(record: LayerRecord) -> Tensor:
            mean = token_mean(probabilities(scores_of(record)), record.routing.token_mask)
            load = shares(batch_counts(record, context)).to(mean.dtype)
            experts = record.routing.num_experts
            if self.options.kind == "average" and load.numel() > experts:
                nulls = load[experts:].mean().expand(load.numel() - experts)
                load = torch.cat([load[:experts], nulls])
            factor = torch.ones_like(mean)
            if self.options.kind == "weighted":
                factor[experts:] = self.options.tau
            scale = load.numel() if self.options.convention == "moelab" else self.top_k[record.layer_id]
            return scale * (factor * load * mean).sum()

        return layer_mean(records, term)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("null_load_balance", NullLoadBalanceOptions, NullLoadBalance)]
