"""Entropies of the routing distribution: of each token, of their mean, and the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import layer_mean, probabilities, scores_of, token_mean

KINDS = ("token", "batch", "mutual_information")


@dataclass
class EntropyOptions:
    weight: float = 1e-4
    kind: str = "token"  # token, batch or mutual_information

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not '{self.kind}'")


class Entropy:
    """Confidence of each token, evenness of their mean, or both as mutual information.

    Formula: with p normalised scores and P their mean over tokens, token: mean of H(p_t), which falls as tokens decide;
    batch: ln E - H(P), 0 at balance and ln E at collapse; mutual_information: mean H(p_t) - H(P), 0 when routing says
    nothing about the token and -ln E when it says all, evenly.
    Source: token: the dynamic loss of top-p routing (2403.07652) eq. 6; the others follow from it.
    Use: token at 1e-4 with top_p. batch and mutual_information take P over the micro-batch: their value depends on
    the split.
    Cost: nothing to speak of.
    """

    needs_batch_counts = False

    def __init__(self, options: EntropyOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        self.kind = options.kind
        self.split_invariant = options.kind == "token"

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        return layer_mean(records, self._layer)

    def _layer(self, record: LayerRecord) -> Tensor:
        p, mask = probabilities(scores_of(record)), record.routing.token_mask
        token = token_mean(entropy(p), mask)
        if self.kind == "token":
            return token
        batch = entropy(token_mean(p, mask))
        return math.log(p.shape[-1]) - batch if self.kind == "batch" else token - batch


def entropy(p: Tensor) -> Tensor:
    """[..., E] -> - sum p ln p over E; floored, so that a p of 0 has a gradient."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("entropy", EntropyOptions, Entropy)]
