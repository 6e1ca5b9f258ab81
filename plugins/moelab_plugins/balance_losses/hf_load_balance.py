"""The load-balancing loss exactly as transformers computes it for Qwen2-MoE and Mixtral."""

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
from moelab.moe.loss_terms import batch_counts, logits_of, token_mean


@dataclass
class HFLoadBalanceOptions:
    weight: float = 0.001  # Qwen2-MoE's router_aux_loss_coef


class HFLoadBalance:
    """transformers' load_balancing_loss_func: all layers pooled, and not divided by K.

    Formula: E * sum_i f_i P_i with f_i = (choices of i over all layers and tokens) / (L T), P_i the mean of
    softmax(W x)_i over all layers and tokens; a choice is one of a token's K largest scores, as there, whatever a bias
    chose. Balanced: K; in load_balance's units divide by K.
    Source: transformers, modeling_qwen2_moe.py. Counted over the whole batch, so that micro-batches change nothing.
    Use: to reproduce a Hugging Face run. Pooling hides imbalances that are opposite in two layers; prefer
    load_balance.
    Cost: as load_balance.
    """

    needs_batch_counts = True

    def __init__(self, options: HFLoadBalanceOptions, context: BalanceLossContext) -> None:
        self.weight = options.weight
        shapes = {(layout.num_experts, layout.num_experts_per_tok) for layout in context.layouts.values()}
        if len(shapes) > 1:
            raise ConfigError(f"pools the layers, whose (num_experts, num_experts_per_tok) differ: {sorted(shapes)}")
        self.top_k = shapes.pop()[1] if shapes else 1

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar over all layers and this micro-batch's tokens."""
        probability = torch.stack(
            [token_mean(logits_of(record).softmax(-1), record.routing.token_mask) for record in records]
        ).mean(0)  # [E]: every layer has the same tokens
        pooled = torch.stack([batch_counts(record, context) for record in records]).sum(0).to(probability.dtype)
        # Every token has K choices in each layer, so sum(pooled) = K L T.
        load = self.top_k * pooled / pooled.sum().clamp_min(1)
        return probability.numel() * (load * probability).sum()

    def qwen2_moe_fields(self) -> dict[str, float]:
        return {"router_aux_loss_coef": self.weight}


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("hf_load_balance", HFLoadBalanceOptions, HFLoadBalance)]
