"""Softmax over every expert, keep the K largest: Qwen2-MoE's router (and, renormalised, Mixtral's)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl


@dataclass
class SoftmaxTopKOptions:
    norm_topk_prob: bool = False  # True: the K weights sum to one. Qwen2-57B-A14B has False


class SoftmaxTopK(nn.Module):
    """w = softmax(W x)[top K], divided by its sum if asked. Qwen2 report 2.2.1; normalised: Mixtral (2401.04088)."""

    def __init__(self, options: SoftmaxTopKOptions, context: MoEContext) -> None:
        super().__init__()
        self.top_k = context.num_experts_per_tok
        self.norm_topk_prob = options.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(context.num_experts, context.hidden_size))

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        with torch.autocast(x.device.type, enabled=False):  # fp32: in bf16 near-ties choose other experts
            logits = nn.functional.linear(x.float(), self.weight.float())  # [T, E]
        scores = logits.softmax(-1)
        weight, expert = torch.topk(scores, self.top_k)  # [T, K]
        if self.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return Routing.from_topk(
            expert, weight, self.weight.shape[0], scores=scores, logits=logits, token_mask=info.mask
        )

    def qwen2_moe_fields(self) -> dict[str, Any]:
        return {"norm_topk_prob": self.norm_topk_prob}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("softmax_topk", SoftmaxTopKOptions, SoftmaxTopK)]
