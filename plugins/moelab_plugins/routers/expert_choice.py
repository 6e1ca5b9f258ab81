"""Experts choose tokens: perfect balance in training, a learned threshold afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import (
    Component,
    ConfigError,
    ExpectedAssignments,
    MoEContext,
    Router,
    Routing,
    TokenInfo,
    component,
    hookimpl,
)
from moelab.moe.capacity import refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.per_sequence import choose_tokens
from moelab.moe.selection import softmax_score


@dataclass
class ExpertChoiceOptions(GateOptions):
    capacity_factor: float = 1.0  # of K S / E tokens an expert takes from each sequence of S
    threshold_ema: float = 0.99  # share of the old threshold that stays after a step
    max_experts_per_token: int | None = None  # at inference, where thresholds decide; null: all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity_factor <= 0 or not 0 <= self.threshold_ema < 1:
            raise ValueError("capacity_factor must be positive, and threshold_ema in 0 .. 1, 1 excluded")
        if self.max_experts_per_token is not None and self.max_experts_per_token < 1:
            raise ValueError(f"max_experts_per_token must be at least 1, not {self.max_experts_per_token}")


class ExpertChoice(LinearRouter):
    """Each expert takes the tokens that score it highest; a token may get none, or all.

    Formula: p = softmax(W x) over experts; in training expert i takes the C = ceil(capacity_factor K S / E) tokens
    of largest p_i of each sequence, with weight p_i. Padding is never taken, and does not count into S.
    Source: expert choice (2202.09368). There the choice is over the whole batch; per sequence, sequences can't
    influence each other and the result does not depend on the micro-batch.
    Inference: token t goes to expert i when p_ti exceeds expert i's threshold, an exponential mean of the C-th
    score over the training steps. That looks at token t alone and so is causal.
    Use: to study perfect balance. Non-causal in training: a token's experts depend on later tokens, hence
    `allow_noncausal`. Evaluation uses the threshold, so its loss is the one that generation will have.
    Cost: one top-C over positions for each expert; no balance loss needed.
    """

    row_tensors = (*LinearRouter.row_tensors, "threshold")
    shared_rows = ("threshold",)  # of a softmax over all experts
    threshold: Tensor
    updates: Tensor

    def __init__(self, options: ExpertChoiceOptions, context: MoEContext) -> None:
        refuse_noncausal(context, "experts choose among all tokens of a sequence")
        super().__init__(options, context)
        self.causal = False  # in training; evaluation looks at each token alone
        self.options = options
        self.share = options.capacity_factor * self.top_k / self.num_experts
        if self.share > 1:
            raise ConfigError(
                f"capacity_factor: {options.capacity_factor} x num_experts_per_tok {self.top_k} exceeds num_experts "
                f"{self.num_experts}: an expert can't take a token twice"
            )
        self.equal_rows = "share" if options.max_experts_per_token is None else None
        self.limit = min(options.max_experts_per_token or self.num_experts, self.num_experts)
        self.register_buffer("threshold", torch.full((self.num_experts,), 1.0 / self.num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """Each expert takes a share c K / E of the tokens (2202.09368, k = n c / e with c = capacity_factor K)."""
        return ExpectedAssignments(self.share * self.num_experts, "capacity_factor K, rounded up in each sequence")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> any number of experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, softmax_score)
        routing = self._experts_choose(scores, info) if info.training else self._thresholds_choose(scores, info)
        return replace(routing, logits=logits)

    def _experts_choose(self, scores: Tensor, info: TokenInfo) -> Routing:
        token, served, threshold = choose_tokens(scores, info, self.share)  # [B, C, E]
        expert = torch.arange(self.num_experts, device=scores.device).expand_as(token)
        token, expert = token.reshape(-1), expert.reshape(-1)
        routing = self._routing(token, expert, scores, info)
        return replace(routing.serve(served.reshape(-1)), statistics=threshold.float())

    def _thresholds_choose(self, scores: Tensor, info: TokenInfo) -> Routing:
        best, expert = scores.topk(self.limit, dim=-1)  # [T, limit]
        routing = Routing.from_topk(
            expert, self.round_weight(best), self.num_experts, scores=scores, token_mask=info.mask
        )
        return routing.serve((best > self.threshold[expert]).reshape(-1))

    def _routing(self, token: Tensor, expert: Tensor, scores: Tensor, info: TokenInfo) -> Routing:
        weight = self.round_weight(scores[token, expert])
        return Routing.from_assignments(
            token, expert, weight, scores.shape[0], self.num_experts, scores=scores, token_mask=info.mask
        )

    @torch.no_grad()
    def after_step(self, counts: Tensor, statistics: Tensor | None = None) -> None:
        """Follow the C-th score: statistics [E], the lowest score chosen, averaged over the batch."""
        if statistics is not None:
            # A plain mean at first: the starting value is a guess that must not linger.
            old = (self.updates / (self.updates + 1.0)).clamp_max(self.options.threshold_ema)
            self.threshold.lerp_(statistics.to(self.threshold), (1 - old).to(self.threshold))
            self.updates += 1

    def qwen2_moe_fields(self) -> str:
        return "its experts choose tokens, and Qwen2-MoE's tokens choose experts"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("expert_choice", ExpertChoiceOptions, ExpertChoice)]
