"""Teaches a causal predictor which tokens Mixture-of-Depths will process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import extra_of, layer_mean, token_mean


@dataclass
class DepthPredictorOptions:
    weight: float = 0.01


class DepthPredictor:
    """Binary cross-entropy between the predictor and who was chosen.

    Formula: mean over tokens of BCE(sigmoid(predictor(x_t)), chosen_t). Its input is detached: only the predictor's own
    weights learn from it. With all logits 0: ln 2.
    Source: Mixture-of-Depths (2404.02258) 3.5, the auxiliary predictor: a small MLP there, one linear row here.
    Use: always with the router mixture_of_depths; without it generation would route by an untrained predictor.
    Cost: nothing to speak of.
    """

    needs_batch_counts = False

    def __init__(self, options: DepthPredictorOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""

        def term(record: LayerRecord) -> Tensor:
            logit = extra_of(record, "depth_logit", "mixture_of_depths")
            target = extra_of(record, "depth_chosen", "mixture_of_depths").to(logit.dtype)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
            return token_mean(loss, record.routing.token_mask)

        return layer_mean(records, term)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("depth_predictor", DepthPredictorOptions, DepthPredictor)]
