"""Null experts among the choices: tokens decide how many real ones they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.selection import normalise, softmax_score


@dataclass
class NullExpertsOptions(GateOptions):
    num_null_experts: int = 1  # choices that compute nothing; as many as experts halve the expected compute

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_null_experts < 1:
            raise ValueError(f"num_null_experts must be at least 1, not {self.num_null_experts}")


class NullExperts(LinearRouter):
    """The K best of real and null experts; weights normalised over the real ones alone.

    Formula: p = softmax(W x) over E + m, S = top-K(p); w_i = p_i / sum of p over the real experts in S. All K null:
    the routed output is zero.
    Source: AdaMoE (2406.13233) 3.2 (section not opened). With the loss null_load_balance of kind average, which leaves
    tokens free to differ in their number of nulls.
    Use: adaptive compute at a bounded maximum; raise num_experts_per_tok accordingly.
    Cost: m more router rows; on average K E / (E + m) experts a token at balance.
    """

    def __init__(self, options: NullExpertsOptions, context: MoEContext) -> None:
        super().__init__(options, context, context.num_experts + options.num_null_experts)

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K E / (E + m), what an even load of all choices leaves to the real ones (AdaMoE 2406.13233, 3.2)."""
        share = self.num_experts / self.weight.shape[0]
        return ExpectedAssignments(self.top_k * share, "K E / (E + num_null_experts), at an even load of all choices")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> up to K real experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, softmax_score)  # [T, E + m]
        probability, choice = scores.topk(self.top_k, dim=-1)
        real = choice < self.num_experts
        weight = self.round_weight(normalise(torch.where(real, probability, 0.0)))
        routing = Routing.from_topk(
            choice.clamp_max(self.num_experts - 1), weight, self.num_experts, scores=scores, logits=logits,
            token_mask=info.mask,
        ).serve(real.reshape(-1))  # fmt: skip
        choices = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, choice, True)
        return replace(routing, choices=choices)

    def qwen2_moe_fields(self) -> str:
        return "its null experts have no place there"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("null_experts", NullExpertsOptions, NullExperts)]
