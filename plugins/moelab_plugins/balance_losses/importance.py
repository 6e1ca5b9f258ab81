"""Evenness of the summed routing weights: the first balance loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import layer_mean, squared_variation


@dataclass
class ImportanceOptions:
    weight: float = 0.1  # Shazeer et al.


class Importance:
    """The squared coefficient of variation of each expert's summed weights.

    Formula: CV^2_i(sum over tokens of w_ti) = variance / mean^2, with the population variance. Balanced: 0; all on
    one expert: E - 1.
    Source: Shazeer et al. (1701.06538) eq. 6-7. FastMoE divides by E - 1 instead of E.
    Use: with noisy_topk and noisy_load. A ratio of sums, so it is a micro-batch's own: its value depends on the split.
    Cost: nothing to speak of.
    """

    needs_batch_counts = False
    split_invariant = False

    def __init__(self, options: ImportanceOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, lambda record: squared_variation(importance(record)))


def importance(record: LayerRecord) -> Tensor:
    """[E] sums of the weights of tokens that are not padding."""
    routing = record.routing
    weight = routing.weight
    if routing.token_mask is not None:
        weight = torch.where(routing.token_mask[routing.token], weight, 0.0)
    return weight.new_zeros(routing.num_experts).index_add(0, routing.expert, weight)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("importance", ImportanceOptions, Importance)]
