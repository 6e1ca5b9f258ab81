"""Each expert's tokens rounded to whole tiles of the kernel: SonicMoE's routing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.capacity import refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.selection import assignments_of_map, normalise, softmax_score

ROUNDING = ("nearest", "up", "down")


@dataclass
class TokenRoundingOptions(GateOptions):
    tile: int = 128  # rows of the matmul's tile
    rounding: str = "nearest"  # nearest, up or down
    norm_topk_prob: bool = True  # the K weights sum to one before rounding, as in SonicMoE's benchmark

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, not {self.tile}")
        if self.rounding not in ROUNDING:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDING)}, not '{self.rounding}'")


class TokenRounding(LinearRouter):
    """Top-K softmax whose counts are rounded to multiples of `tile` in training.

    Formula: an expert chosen c times serves r = tile * round(c / tile) tokens, half a tile going to the even count: of
    those that chose it the ones with the largest weights, and where r > c those of the others with the largest p too,
    at weight p; never more than there are. The K weights are normalised before, and nothing is afterwards: what was
    rounded away or added changes a token's sum. In evaluation plain top-K.
    Source: SonicMoE (2512.14080) 4, token rounding (section not opened); its code's benchmarks/moe-token-rounding.py at
    8565e84.
    Use: kernels that pad each expert to a tile, at high sparsity. Non-causal in training, hence `allow_noncausal`.
    Cost: one sort of [T, E]. Loads far below a tile round to nothing: keep K T / E above it.
    """

    equal_rows = "share"

    def __init__(self, options: TokenRoundingOptions, context: MoEContext) -> None:
        refuse_noncausal(context, "rounding an expert's count drops or adds tokens by their rank in the batch")
        super().__init__(options, context)
        self.causal = False  # in training; evaluation looks at each token alone
        self.options = options

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K where loads are far above a tile: rounding then moves each expert's count by less than a tile."""
        return ExpectedAssignments(self.top_k, "K of the layout, off by less than a tile of rows an expert")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> about K experts for each token in training, K afterwards."""
        logits = self.logits(x)
        scores = self.score(logits, softmax_score)
        weight, expert = scores.topk(self.top_k, dim=-1)
        if self.options.norm_topk_prob:
            weight = normalise(weight)
        if not info.training:
            return Routing.from_topk(
                expert, self.round_weight(weight), self.num_experts, scores=scores, logits=logits, token_mask=info.mask
            )
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, expert, True)
        chosen = chosen & info.valid().unsqueeze(-1)
        weights = self.round_weight(scores.scatter(1, expert, weight))  # [T, E]: of the others p itself
        served = self._round(weights.detach(), chosen, info.valid())  # [T, E]
        weights = torch.where(served, weights, 0.0)
        limit = min(scores.numel(), expert.numel() + self.num_experts * self.options.tile)
        token, expert, valid = assignments_of_map(served, limit)
        routing = Routing.from_assignments(
            token, expert, weights[token, expert], len(x), self.num_experts,
            scores=scores, logits=logits, token_mask=info.mask, dropped=(chosen & ~served).sum(),
        ).serve(valid)  # fmt: skip
        return replace(routing, choices=chosen)

    def _round(self, weights: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
        """weights, chosen [T, E], valid [T] -> served [T, E] bool."""
        tiles = chosen.sum(0).double() / self.options.tile
        rounded = {"nearest": torch.round, "up": torch.ceil, "down": torch.floor}[self.options.rounding](tiles)
        target = (rounded.long() * self.options.tile).minimum(valid.sum())  # [E]
        # Weights are at most one: whoever chose the expert comes before whoever did not.
        key = (weights + 2 * chosen).masked_fill(~valid.unsqueeze(-1), -1.0)
        rank = key.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        return (rank < target) & valid.unsqueeze(-1)

    def qwen2_moe_fields(self) -> dict[str, bool]:
        return {"norm_topk_prob": self.options.norm_topk_prob}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("token_rounding", TokenRoundingOptions, TokenRounding)]
