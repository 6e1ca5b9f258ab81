"""Keeps router logits small: ST-MoE's z-loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import layer_mean, logits_of, token_mean


@dataclass
class RouterZOptions:
    weight: float = 0.001  # ST-MoE


class RouterZ:
    """The squared logsumexp of the logits.

    Formula: mean over tokens of (log sum_i exp z_ti)^2, meaned over layers. All logits zero: (ln E)^2, which is
    17.296 for E = 64. Least at logsumexp = 0, that is z = -ln E, and not at balance.
    Source: ST-MoE (2202.08906) eq. 5.
    Use: with softmax routers, against logits that grow until bfloat16 rounds them; not a balance loss by itself.
    Cost: nothing to speak of.
    """

    needs_batch_counts = False

    def __init__(self, options: RouterZOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, lambda r: token_mean(logits_of(r).logsumexp(-1).square(), r.routing.token_mask))


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("router_z", RouterZOptions, RouterZ)]
