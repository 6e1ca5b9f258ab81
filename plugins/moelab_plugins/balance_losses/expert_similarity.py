"""How much the experts resemble each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import (
    BalanceContext,
    BalanceLoss,
    BalanceLossContext,
    Component,
    ConfigError,
    LayerRecord,
    component,
    hookimpl,
)
from moelab.moe.loss_terms import layer_mean


@dataclass
class ExpertSimilarityOptions:
    weight: float = 0.0  # 0: watched, not trained


class ExpertSimilarity:
    """Mean cosine between the weights of two experts.

    Formula: mean over i < j of cos(W_i, W_j), W_i all of an expert's weights as one vector; meaned over layers. Copies:
    1; independent experts: about 0; one expert: 0.
    Source: Lo et al. (2406.18219) 3; the plainest answer to "did upcycled experts diverge?".
    Use: at weight 0 to watch it, above to push experts apart. Neurons in another order count as different.
    Cost: 3 E^2 F D multiply-adds a layer and micro-batch, as much as the experts cost for E^2 / K tokens; over several
    processes every one of them gathers the layer's experts, and keeps them until the backward pass.
    """

    needs_batch_counts = False
    needs_expert_weights = True

    def __init__(self, options: ExpertSimilarityOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, self._layer)

    def _layer(self, record: LayerRecord) -> Tensor:
        if record.gate_up is None or record.down is None:
            raise ConfigError(f"layer {record.layer_id}: this loss needs the experts' weights, and the record has none")
        with torch.autocast(record.down.device.type, enabled=False):
            parts = [weight.flatten(1) for weight in (record.gate_up, record.down)]
            gram = sum((part @ part.t() for part in parts), torch.zeros((), device=record.down.device))  # [E, E]
        norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        cosine = gram / (norm[:, None] * norm)
        experts = len(cosine)
        return (cosine.sum() - cosine.diagonal().sum()) / max(experts * (experts - 1), 1)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("expert_similarity", ExpertSimilarityOptions, ExpertSimilarity)]
