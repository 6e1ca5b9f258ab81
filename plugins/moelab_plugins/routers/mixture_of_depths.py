"""Some tokens pass through the experts, the others go round them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moelab import Component, ExpectedAssignments, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.capacity import refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter, project
from moelab.moe.per_sequence import choose_tokens
from moelab.moe.selection import normalise, softmax_score


@dataclass
class MixtureOfDepthsOptions(GateOptions):
    capacity: float = 0.125  # share of each sequence's tokens that is processed
    norm_topk_prob: bool = True  # of the experts' weights, before they are scaled by the token's own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity must be in 0 .. 1, 0 excluded, not {self.capacity}")


class MixtureOfDepths(LinearRouter):
    """The best `capacity` of each sequence's tokens go to their top-K experts; the others skip the layer.

    Formula: r = w_r x; in training the ceil(capacity S) tokens of largest r of each sequence have weights
    sigmoid(r) * softmax(W x)_S. With one expert this is Mixture-of-Depths on the feed-forward layer.
    Source: Mixture-of-Depths (2404.02258) 3, staged MoDE; sigmoid, as r may be negative, and the predictor is one
    linear row where 3.5 has a small MLP.
    Inference: a predictor on the detached x, trained by the loss depth_predictor to tell who was chosen, decides for
    each token alone, and so is causal.
    Use: every other layer, by model.moe.layers. Non-causal in training, hence `allow_noncausal`.
    Cost: `capacity` of the routed compute.
    """

    equal_rows = "share"

    def __init__(self, options: MixtureOfDepthsOptions, context: MoEContext) -> None:
        refuse_noncausal(context, "the tokens of a sequence compete for being processed")
        super().__init__(options, context)
        self.causal = False  # in training; evaluation looks at each token alone
        self.options = options
        self.depth_weight = nn.Parameter(torch.empty(1, context.hidden_size))
        self.predictor_weight = nn.Parameter(torch.empty(1, context.hidden_size))

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K experts for `capacity` of the tokens (2404.02258)."""
        return ExpectedAssignments(self.options.capacity * self.top_k, "capacity K, rounded up in each sequence")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for the chosen tokens, none for the others."""
        logits = self.logits(x)
        scores = self.score(logits, softmax_score)
        depth = project(x, self.depth_weight, self.precision.projection_dtype)  # [T, 1]
        predicted = project(x.detach(), self.predictor_weight, self.precision.projection_dtype).squeeze(-1)
        probability, expert = scores.topk(self.top_k, dim=-1)
        if self.options.norm_topk_prob:
            probability = normalise(probability)
        weight = self.round_weight(probability * depth.sigmoid())
        if not info.training:
            routing = Routing.from_topk(
                expert, weight, self.num_experts, scores=scores, logits=logits, token_mask=info.mask
            )
            return routing.serve((predicted > 0).repeat_interleave(self.top_k, output_size=expert.numel()))
        token, served, _ = choose_tokens(depth, info, self.options.capacity)  # [B, C, 1]
        token, served = token.reshape(-1), served.reshape(-1)
        chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_put((token,), served)
        routing = Routing.from_assignments(
            token.repeat_interleave(self.top_k, output_size=token.numel() * self.top_k),
            expert[token].reshape(-1), weight[token].reshape(-1), len(x), self.num_experts,
            scores=scores, logits=logits, token_mask=info.mask,
        ).serve(served.repeat_interleave(self.top_k, output_size=token.numel() * self.top_k))  # fmt: skip
        return replace(routing, extras={"depth_logit": predicted, "depth_chosen": chosen})

    def qwen2_moe_fields(self) -> str:
        return "its tokens may skip the layer"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("mixture_of_depths", MixtureOfDepthsOptions, MixtureOfDepths)]
