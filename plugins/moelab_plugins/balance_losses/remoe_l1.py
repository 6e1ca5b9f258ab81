"""ReMoE's L1 term, with a coefficient that steers the number of active experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLoss, BalanceLossContext, Component, LayerRecord, component, hookimpl
from moelab.moe.loss_terms import scores_of, token_mean


@dataclass
class ReMoEL1Options:
    weight: float = 1e-8  # the coefficient at the start; it adapts
    factor: float = 1.2  # the coefficient is multiplied or divided by it after each step
    adaptive: bool = True  # False: the coefficient stays

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ValueError(f"factor must be greater than 1, not {self.factor}")


class ReMoEL1:
    """L1 norm of the ReLU scores, each expert's weighted by its load, under an adaptive coefficient.

    Formula: sum_i (E c_i / (K T)) * mean over tokens of relu(z_ti), meaned over layers; c_i the tokens of expert i
    in the whole batch. After each step the coefficient is multiplied by factor while the share of inactive pairs of
    token and expert is below 1 - K / E, and divided by it otherwise.
    Source: ReMoE (2412.14711) eq. 7-9, with load balancing. The tokens counted are those that an expert serves.
    Use: with the router remoe, which without it stays dense. The coefficient is state: it is in every checkpoint.
    Cost: the whole batch's counts before the first backward pass.
    """

    needs_batch_counts = True

    def __init__(self, options: ReMoEL1Options, context: BalanceLossContext) -> None:
        self.options = options
        self.weight = options.weight
        self.layouts = context.layouts

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor:
        """-> scalar."""
        terms = []
        for record in records:
            score = token_mean(scores_of(record), record.routing.token_mask)  # [E]
            counts, tokens = record.wanted, _tokens(record)
            if context.batch_counts is not None and context.batch_tokens is not None:
                counts, tokens = context.batch_counts[record.layer_id].to(score.device), context.batch_tokens
            load = counts.to(score.dtype) / tokens.to(score).clamp_min(1)
            terms.append(score.numel() / self.layouts[record.layer_id].num_experts_per_tok * (load * score).sum())
        return torch.stack(terms).mean()

    def after_step(self, context: BalanceContext) -> None:
        """Steer by the sparsity of the whole batch, meaned over layers."""
        if not self.options.adaptive or context.batch_counts is None or context.batch_tokens is None:
            return
        tokens = max(float(context.batch_tokens), 1.0)
        found, wanted = [], []
        for layer_id, layout in self.layouts.items():
            found.append(1 - float(context.batch_counts[layer_id].sum()) / (tokens * layout.num_experts))
            wanted.append(1 - layout.num_experts_per_tok / layout.num_experts)
        self.weight *= self.options.factor if sum(found) < sum(wanted) else 1 / self.options.factor

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": torch.tensor(self.weight, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weight = float(state["weight"])


def _tokens(record: LayerRecord) -> Tensor:
    mask = record.routing.token_mask
    return torch.tensor(record.routing.num_tokens) if mask is None else mask.sum()


@hookimpl
def moelab_balance_losses() -> list[Component[BalanceLossContext, BalanceLoss]]:
    return [component("remoe_l1", ReMoEL1Options, ReMoEL1)]
