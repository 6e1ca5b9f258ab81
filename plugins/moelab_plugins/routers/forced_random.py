"""Random experts: a yardstick for kernels, never for models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.gate import noise_generator


@dataclass
class ForcedRandomOptions:
    pass


class ForcedRandom(nn.Module):
    """K experts by chance. FORCED BALANCE: for benchmarks.

    Formula: S uniform without replacement, w = 1 / K. Drawn anew for each micro-batch in training; afterwards a
    fixed function of token id and position.
    Source: none; what most published throughputs use.
    Use: to measure kernels apart from routing. The run's name says FORCED.
    Cost: none, and no learning.
    """

    forced = True
    learns = False
    batch_invariant = False  # drawn anew for each batch

    def __init__(self, options: ForcedRandomOptions, context: MoEContext) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.layer_id = context.num_experts, context.num_experts_per_tok, context.layer_id

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        if info.training:
            source = noise_generator(info, self.layer_id, x.device)
            draw = torch.rand(len(x), self.num_experts, device=x.device, generator=source)
        else:
            draw = self._hash(info)
        expert = draw.topk(self.top_k, dim=-1).indices
        weight = torch.full(expert.shape, 1 / self.top_k, dtype=torch.float32, device=x.device)
        return Routing.from_topk(expert, weight, self.num_experts, token_mask=info.mask)

    def _hash(self, info: TokenInfo) -> Tensor:
        """[T, E] numbers that look random and depend on token id and position alone (a multiply-shift hash)."""
        key = info.token_id * 1_000_003 + info.position * 7_919 + self.layer_id * 104_729
        key = key[:, None] * 31 + torch.arange(self.num_experts, device=info.token_id.device)
        for _ in range(3):
            key = ((key ^ (key >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return key.to(torch.float64)

    def qwen2_moe_fields(self) -> str:
        return "it routes by chance"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("forced_random", ForcedRandomOptions, ForcedRandom)]
