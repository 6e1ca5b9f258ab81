"""ReLU instead of top K: differentiable routing, made sparse by an adaptive L1 term."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.gate import GateOptions, LinearRouter


@dataclass
class ReMoEOptions(GateOptions):
    k_max: int | None = None  # most experts a token may have; null: all. The first steps are nearly dense

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_max is not None and self.k_max < 1:
            raise ValueError(f"k_max must be at least 1, not {self.k_max}")


class ReMoE(LinearRouter):
    """Every expert whose logit is positive, weighted by that logit.

    Formula: w = max(0, W x); S = {i: w_i > 0}, so a token may have no expert, or all.
    Source: ReMoE (2412.14711) 3.1 (section not opened). Needs the loss remoe_l1, which drives the mean number of
    experts to the layout's num_experts_per_tok.
    Use: routing without the discontinuity of top K.
    Cost: near E / 2 experts a token at the start, some hundred steps later K; k_max bounds the memory.
    """

    def __init__(self, options: ReMoEOptions, context: MoEContext) -> None:
        super().__init__(options, context)
        self.k_max = min(options.k_max or context.num_experts, context.num_experts)
        self.equal_rows = "whole" if options.k_max is None else None

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K, where remoe_l1 leads in some hundred steps (ReMoE 2412.14711); about E / 2 at the start."""
        why = "K of the layout, where the loss remoe_l1 leads; about E / 2 at the start"
        return ExpectedAssignments(min(self.top_k, self.k_max), why, settled=False)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> up to k_max experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, torch.relu)
        weight, expert = scores.topk(self.k_max, dim=-1)
        routing = Routing.from_topk(
            expert, self.round_weight(weight), self.num_experts, scores=scores, logits=logits, token_mask=info.mask
        ).serve((weight > 0).reshape(-1))
        if self.k_max == self.num_experts:
            return routing
        wanted = (scores > 0) & info.valid().unsqueeze(-1)
        return replace(routing, choices=scores > 0, dropped=wanted.sum() - routing.counts().sum())

    def qwen2_moe_fields(self) -> str:
        return "its weights are ReLUs, and Qwen2-MoE takes a softmax"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("remoe", ReMoEOptions, ReMoE)]
