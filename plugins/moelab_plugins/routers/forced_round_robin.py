"""Experts in turn: perfect balance for benchmarks, never for models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl


@dataclass
class ForcedRoundRobinOptions:
    pass


class ForcedRoundRobin(nn.Module):
    """Experts in turn along the sequence. FORCED BALANCE: for benchmarks.

    Formula: S_t = {(K t + j) mod E: j < K}, t the position; w = 1 / K. Exactly balanced where E divides K S.
    Source: none; the best case that any kernel can meet.
    Use: to measure kernels apart from routing. The run's name says FORCED.
    Cost: none, and no learning.
    """

    forced = True
    learns = False

    def __init__(self, options: ForcedRoundRobinOptions, context: MoEContext) -> None:
        super().__init__()
        self.num_experts, self.top_k = context.num_experts, context.num_experts_per_tok

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        turn = torch.arange(self.top_k, device=x.device)
        expert = (info.position[:, None] * self.top_k + turn) % self.num_experts
        weight = torch.full(expert.shape, 1 / self.top_k, dtype=torch.float32, device=x.device)
        return Routing.from_topk(expert, weight, self.num_experts, token_mask=info.mask)

    def qwen2_moe_fields(self) -> str:
        return "it routes by position"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("forced_round_robin", ForcedRoundRobinOptions, ForcedRoundRobin)]
