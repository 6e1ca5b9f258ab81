"""Top K of an optimal-transport plan: S-BASE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Component, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.capacity import refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter


@dataclass
class SinkhornOptions(GateOptions):
    iterations: int = 8  # of scaling rows and columns; a fixed number, so that nothing waits for the device

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")


class Sinkhorn(LinearRouter):
    """In training the K largest of a doubly balanced plan; afterwards the K largest logits.

    Formula: Pi = diag(a) exp(W x) diag(b) with rows summing to 1/T and columns to 1/E; S = top-K(Pi) without
    gradient; w = sigmoid(W x) at K = 1, softmax(W x) otherwise.
    Source: S-BASE (2202.01169) 3.2 (section not opened), Megatron-Core's sinkhorn; in the log domain here, where exp
    can't overflow.
    Use: balance without a loss. Non-causal in training: the plan looks at all tokens of the micro-batch, hence
    `allow_noncausal` and a balance that depends on the micro-batch. A balance loss beside it (Megatron allows none)
    counts the K best scores, not the plan's choices.
    Cost: `iterations` passes over [T, E].
    """

    def __init__(self, options: SinkhornOptions, context: MoEContext) -> None:
        refuse_noncausal(context, "the transport plan balances all tokens of the micro-batch against each other")
        super().__init__(options, context)
        self.causal = False  # in training; evaluation looks at each token alone
        self.iterations = options.iterations
        self.equal_rows = "share" if self.top_k > 1 else None  # at K = 1 its weights are sigmoids

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        logits = self.logits(x)
        scores = self.score(logits, torch.sigmoid if self.top_k == 1 else lambda z: z.softmax(-1))
        chosen_by = logits.detach()
        if info.training:
            chosen_by = transport_plan(chosen_by, info.mask, self.iterations)
        expert = chosen_by.topk(self.top_k, dim=-1).indices
        weight = self.round_weight(scores.gather(1, expert))
        return Routing.from_topk(expert, weight, self.num_experts, scores=scores, logits=logits, token_mask=info.mask)

    def qwen2_moe_fields(self) -> dict[str, bool] | str:
        if self.top_k == 1:
            return "its weights are sigmoids, and Qwen2-MoE takes a softmax"
        return {"norm_topk_prob": False}


def transport_plan(logits: Tensor, mask: Tensor | None, iterations: int) -> Tensor:
    """logits [T, E] -> log of the plan, [T, E]; padding has no mass."""
    tokens, experts = logits.shape
    real = logits.new_full((), tokens)
    if mask is not None:
        real = mask.sum().to(logits.dtype).clamp_min(1)
        logits = logits.masked_fill(~mask.unsqueeze(-1), -1e30)
    column = logits.new_zeros(1, experts)
    row = logits.new_zeros(tokens, 1)
    for _ in range(iterations):
        row = -real.log() - (logits + column).logsumexp(1, keepdim=True)
        if mask is not None:
            row = row.masked_fill(~mask.unsqueeze(-1), -1e30)
        column = -math.log(experts) - (logits + row).logsumexp(0, keepdim=True)
    row = -real.log() - (logits + column).logsumexp(1, keepdim=True)
    return logits + row + column


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("sinkhorn", SinkhornOptions, Sinkhorn)]
