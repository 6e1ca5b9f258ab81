"""Experts by token id, from a fixed table: nothing to learn, nothing to balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.token_table import TokenTable, token_table


@dataclass
class HashOptions(TokenTable):
    pass


class Hash(nn.Module):
    """Experts by the token's id.

    Formula: S_t = table[id_t], w = 1 / K. The table deals ids to experts evenly at random, or, with `frequencies`,
    the most frequent id first to the expert with the least mass so far; further choices are distinct.
    Source: hash layers (2106.04426) 3 (section not opened), random balanced and frequency-balanced hashing.
    Use: a baseline that learned routers must beat; the first layers of deep models. Where the table is to choose and
    learned scores are to weigh, as in DeepSeek-V4's first layers: `token_table` of the top-K routers.
    Cost: a table of V x K int64; the loads are those of the text. Gives no scores, so most losses refuse it.
    """

    learns = False
    expert_rows = "its table deals token ids to all experts at once; start a new run with another table"
    table: Tensor

    def __init__(self, options: HashOptions, context: MoEContext) -> None:
        super().__init__()
        self.num_experts, self.top_k = context.num_experts, context.num_experts_per_tok
        self.register_buffer("table", token_table(options, context))

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token; x itself is not looked at."""
        expert = self.table[info.token_id]
        weight = torch.full(expert.shape, 1 / self.top_k, dtype=torch.float32, device=x.device)
        return Routing.from_topk(expert, weight, self.num_experts, token_mask=info.mask)

    def qwen2_moe_fields(self) -> str:
        return "its table has no place there"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("hash", HashOptions, Hash)]
