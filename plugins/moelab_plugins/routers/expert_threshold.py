"""A token goes to every expert whose threshold it exceeds, in training as in generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.bias import exceeded, histogram
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.selection import sigmoid_score


@dataclass
class ExpertThresholdOptions(GateOptions):
    threshold_ema: float = 0.99  # share of the old threshold that stays after a step
    k_max: int | None = None  # most experts a token may have; null: all. Bounds memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_ema < 1:
            raise ValueError(f"threshold_ema must be in 0 .. 1, 1 excluded, not {self.threshold_ema}")
        if self.k_max is not None and self.k_max < 1:
            raise ValueError(f"k_max must be at least 1, not {self.k_max}")


class ExpertThreshold(LinearRouter):
    """Expert i serves token t where its logit exceeds c_i, the level that a share K / E of all tokens exceeds.

    Formula: z = W x, S_t = {i: z_ti > c_i}, w = sigmoid(z_S). After each optimizer step c_i moves towards the quantile
    1 - K / E of z_i over the whole batch, of which threshold_ema stays; at first it is the plain mean of what was seen,
    and before the first step a token takes its K best.
    Source: expert threshold routing (2603.11535), abstract and introduction; score function, rate and start are ours,
    as its other sections could not be opened. The quantile is read off a histogram that is pooled over micro-batches
    and ranks, as Kimi K3 reads its bias.
    Use: as many experts as a token is worth, even loads without a loss, and causal in training too, where
    expert_choice is not.
    Cost: a histogram of [T, E] in training; K experts a token on average, from none to all: k_max bounds them.
    """

    threshold: Tensor
    updates: Tensor

    row_tensors = (*LinearRouter.row_tensors, "threshold")

    def __init__(self, options: ExpertThresholdOptions, context: MoEContext) -> None:
        super().__init__(options, context)
        self.options = options
        self.k_max = min(options.k_max or self.num_experts, self.num_experts)
        self.register_buffer("threshold", torch.zeros(self.num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """Each expert's threshold is exceeded by a share K / E of the tokens."""
        most = min(self.top_k, self.k_max)
        return ExpectedAssignments(most, "K of the layout, where the thresholds have settled")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> up to k_max experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, sigmoid_score)
        seen = logits.detach()
        margin = seen - torch.where(self.updates > 0, self.threshold.to(seen.dtype), self._best(seen))  # [T, E]
        if self.k_max == self.num_experts:
            expert = torch.arange(self.num_experts, device=x.device).expand_as(margin)
            served, dropped = margin > 0, None
        else:
            best, expert = margin.topk(self.k_max, dim=-1)
            served = best > 0
            over = (margin > 0).sum(-1) - served.sum(-1)
            dropped = (over * info.valid()).sum()
        weight = self.round_weight(scores.gather(1, expert))
        routing = Routing.from_topk(
            expert, weight, self.num_experts, scores=scores, logits=logits, token_mask=info.mask
        ).serve(served.reshape(-1))
        statistics = histogram(seen - self.threshold, info.mask) if info.training else None
        return replace(routing, choices=margin > 0, dropped=dropped, statistics=statistics)

    def _best(self, logits: Tensor) -> Tensor:
        """[T, E] -> [T, 1], what a token's K best exceed."""
        if self.top_k == self.num_experts:
            return torch.full_like(logits[:, :1], float("-inf"))
        return logits.topk(self.top_k + 1, dim=-1).values[:, -1:]

    @torch.no_grad()
    def after_step(self, counts: Tensor, statistics: Tensor | None = None) -> None:
        """Follow the quantile: statistics [E * M], of `histogram` around the threshold in use."""
        if statistics is None:
            return
        found = exceeded(statistics.to(self.threshold.device), self.num_experts, self.top_k / self.num_experts)
        # A plain mean at first: the starting value is a guess that must not linger.
        stays = (self.updates / (self.updates + 1.0)).clamp_max(self.options.threshold_ema)
        self.threshold.add_(torch.where(found.isnan(), 0.0, (1 - stays) * found))
        self.updates += (~found.isnan()).all()

    def qwen2_moe_fields(self) -> str:
        return "its tokens have different numbers of experts"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("expert_threshold", ExpertThresholdOptions, ExpertThreshold)]
