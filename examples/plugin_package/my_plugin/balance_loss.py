"""A balance loss: how uneven the mean scores of the experts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import moelab


@dataclass
class Options:
    weight: float = 0.01  # the trainer multiplies by it


class MyBalanceLoss:
    """E times the sum of squared mean scores, less 1: 0 when every expert has the same, E - 1 when one has all.

    T tokens, E experts.
    """

    needs_batch_counts = False  # whether it reads context.batch_counts
    split_invariant = False  # squares of a micro-batch's means, which depend on how the batch is split

    def __init__(self, options: Options, context: moelab.BalanceLossContext) -> None:
        self.weight = options.weight

    def __call__(self, records: Sequence[moelab.LayerRecord], context: moelab.BalanceContext) -> torch.Tensor:
        """The records of the MoE layers -> scalar, meaned over layers, without its weight."""
        return torch.stack([self._of_layer(record) for record in records]).mean()

    def _of_layer(self, record: moelab.LayerRecord) -> torch.Tensor:
        routing = record.routing
        if routing.scores is None:
            raise moelab.ConfigError(f"layer {record.layer_id}: the router gives no scores, and this loss needs them")
        mask = torch.ones_like(routing.scores[:, 0]) if routing.token_mask is None else routing.token_mask.float()
        share = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(1e-9)  # [T, E]
        mean = (share * mask[:, None]).sum(0) / mask.sum().clamp_min(1)  # [E]
        return routing.num_experts * mean.square().sum() - (mask.sum() > 0).float()


@moelab.hookimpl
def moelab_balance_losses() -> list[moelab.Component]:
    return [moelab.component("my_balance_loss", Options, MyBalanceLoss)]
