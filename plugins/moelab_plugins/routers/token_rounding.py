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
    norm_topk_prob: bool = False  # True: the weights that serve a token sum to one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, not {self.tile}")
        if self.rounding not in ROUNDING:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDING)}, not '{self.rounding}'")


class TokenRounding(LinearRouter):
    """Top-K softmax whose counts are rounded to multiples of `tile` in training.

    Formula: an expert chosen c times serves r = tile * round(c / tile) tokens: of those that chose it the best, and
    where r > c the best of the others too; never more than there are. Afterwards plain top-K.
    Source: SonicMoE (2512.14080) 4, token rounding.
    Use: kernels that pad each expert to a tile, at high sparsity. Non-causal in training, hence `allow_noncausal`.
    Cost: one sort of [T, E]. Loads far below a tile round to nothing: keep K T / E above it.
    """

    def __init__(self, options: TokenRoundingOptions, context: MoEContext) -> None:
        refuse_noncausal(context, "rounding an expert's count drops or adds tokens by their rank in the batch")
        super().__init__(options, context)
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
        if not info.training:
            weight = normalise(weight) if self.options.norm_topk_prob else weight
            return Routing.from_topk(
                expert, self.round_weight(weight), self.num_experts, scores=scores, logits=logits, token_mask=info.mask
            )
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, expert, True)
        chosen = chosen & info.valid().unsqueeze(-1)
        served = self._round(scores.detach(), chosen, info.valid())  # [T, E]
        weights = torch.where(served, scores, 0.0)
        weights = self.round_weight(normalise(weights) if self.options.norm_topk_prob else weights)
        limit = min(scores.numel(), expert.numel() + self.num_experts * self.options.tile)
        token, expert, valid = assignments_of_map(served, limit)
        routing = Routing.from_assignments(
            token, expert, weights[token, expert], len(x), self.num_experts,
            scores=scores, logits=logits, token_mask=info.mask, dropped=(chosen & ~served).sum(),
        ).serve(valid)  # fmt: skip
        return replace(routing, choices=chosen)

    def _round(self, scores: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
        """scores, chosen [T, E], valid [T] -> served [T, E] bool."""
        tile, counts = self.options.tile, chosen.sum(0)
        up = {"nearest": tile // 2, "up": tile - 1, "down": 0}[self.options.rounding]
        target = ((counts + up) // tile * tile).minimum(valid.sum())  # [E]
        # Scores are at most one: whoever chose the expert comes before whoever did not.
        key = (scores + 2 * chosen).masked_fill(~valid.unsqueeze(-1), -1.0)
        rank = key.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        return (rank < target) & valid.unsqueeze(-1)

    def qwen2_moe_fields(self) -> dict[str, bool]:
        return {"norm_topk_prob": self.options.norm_topk_prob}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("token_rounding", TokenRoundingOptions, TokenRounding)]
