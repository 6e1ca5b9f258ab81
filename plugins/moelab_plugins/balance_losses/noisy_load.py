"""Evenness of a smooth estimate of the load: the companion of noisy top K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import extra_of, layer_mean, logits_of, squared_variation


@dataclass
class NoisyLoadOptions:
    weight: float = 0.1  # Shazeer et al.


class NoisyLoad:
    """The squared coefficient of variation of each expert's expected load under the router's noise.

    Formula: CV^2_i(sum over tokens of Phi((z_ti - kth_ti) / std_ti)), z the clean logits, kth_ti the K-th largest noisy
    logit of the token's other experts. Balanced: 0.
    Source: Shazeer et al. (1701.06538) eq. 8-11.
    Use: with the router noisy_topk only; smooth where counts are not.
    Cost: a top-(K + 1) over [T, E].
    """

    needs_batch_counts = False
    split_invariant = False

    def __init__(self, options: NoisyLoadOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.top_k = {layer: layout.num_experts_per_tok for layer, layout in context.layouts.items()}

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, self._layer)

    def _layer(self, record: LayerRecord) -> Tensor:
        noisy = extra_of(record, "noisy_logits", "noisy_topk")
        std = extra_of(record, "noise_std", "noisy_topk")
        top_k = self.top_k[record.layer_id]
        if top_k == noisy.shape[-1]:
            return noisy.sum() * 0.0  # every expert serves every token
        best = noisy.topk(top_k + 1, dim=-1).values
        inside = noisy >= best[:, top_k - 1 : top_k]  # without itself, the K-th of the others is the (K + 1)-th of all
        threshold = torch.where(inside, best[:, top_k:], best[:, top_k - 1 : top_k])
        chance = torch.special.ndtr((logits_of(record) - threshold) / std)
        if record.routing.token_mask is not None:
            chance = torch.where(record.routing.token_mask.unsqueeze(-1), chance, 0.0)
        return squared_variation(chance.sum(0))


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("noisy_load", NoisyLoadOptions, NoisyLoad)]
