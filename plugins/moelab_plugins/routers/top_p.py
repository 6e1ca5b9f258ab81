"""As many experts as it takes to gather a share of the probability."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.selection import normalise, softmax_score


@dataclass
class TopPOptions(GateOptions):
    top_p: float = 0.4  # probability to gather
    k_max: int | None = None  # most experts a token may have; null: all. Bounds memory
    norm_topk_prob: bool = False  # True: a token's weights sum to one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in 0 .. 1, 0 excluded, not {self.top_p}")
        if self.k_max is not None and self.k_max < 1:
            raise ValueError(f"k_max must be at least 1, not {self.k_max}")


class TopP(LinearRouter):
    """The fewest experts whose probabilities sum to top_p, the one that crosses it included.

    Formula: p = softmax(W x), sorted; S = the smallest prefix with sum >= top_p, at least one, at most k_max; w = p_S.
    Source: Huang et al. (2403.07652) 3.2 (section not opened); with their dynamic loss, `entropy` of kind token at
    weight 1e-4, without which the router flattens p and uses ever more experts.
    Use: compute that follows a token's difficulty. num_experts_per_tok of the layout is not used.
    Cost: a sort over E, and as many experts as it chooses: watch moe/mean/top_k_mass and the counts.
    """

    def __init__(self, options: TopPOptions, context: MoEContext) -> None:
        super().__init__(options, context)
        self.options = options
        self.k_max = min(options.k_max or context.num_experts, context.num_experts)

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """At most ceil(top_p E): no distribution needs more of its largest than the even one."""
        most = min(math.ceil(self.options.top_p * self.num_experts - 1e-9), self.k_max)
        why = "at most: ceil(top_p E), what a router without a preference serves; fewer the surer it is"
        return ExpectedAssignments(most, why, settled=False)

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> one to k_max experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, softmax_score)
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)  # [T, E]
        before = ordered.detach().cumsum(-1) - ordered.detach()
        wanted = before < self.options.top_p
        wanted[:, 0] = True
        expert, served = order[:, : self.k_max], wanted[:, : self.k_max]
        weight = torch.where(served, ordered[:, : self.k_max], 0.0)
        if self.options.norm_topk_prob:
            weight = normalise(weight)
        routing = Routing.from_topk(
            expert, self.round_weight(weight), self.num_experts, scores=scores, logits=logits, token_mask=info.mask
        ).serve(served.reshape(-1))
        if self.k_max == self.num_experts:
            return routing
        choices = torch.zeros_like(wanted).scatter_(1, order, wanted)
        over = wanted[:, self.k_max :] & info.valid().unsqueeze(-1)
        return replace(routing, choices=choices, dropped=over.sum())

    def qwen2_moe_fields(self) -> str:
        return "its tokens have different numbers of experts"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("top_p", TopPOptions, TopP)]
