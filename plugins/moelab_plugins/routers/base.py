"""One expert for each token by a balanced assignment of the whole micro-batch: BASE layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Component, ConfigError, MoEContext, Router, Routing, TokenInfo, component, hookimpl
from moelab.moe.capacity import rank_in_expert, refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter
from moelab.moe.selection import sigmoid_score
from moelab.moe.waiting import waiting_is_free


@dataclass
class BaseOptions(GateOptions):
    rounds: int = 64  # of bidding; a fixed number, so that nothing waits for the device
    # By how much a bid exceeds what makes a token indifferent; smaller: nearer the optimum, in more rounds.
    least_bid: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.least_bid <= 0:
            raise ValueError("rounds must be at least 1, and least_bid positive")


class Base(LinearRouter):
    """In training the assignment of largest total affinity with equally many tokens for each expert; else the best.

    Formula: maximise the sum of z_t,e(t), z = W x, with at most ceil(T / E) tokens an expert; w = sigmoid(z_t,e(t)). In
    evaluation e(t) is the best expert.
    Source: BASE layers (2103.16716; the paper was not opened), as fairseq's modules/base_layer.py has them: an auction,
    sigmoid weights, centroids that start orthogonal (`start: orthogonal`; there at length 0.1). There tokens are first
    shuffled over all workers; here each micro-batch is balanced alone.
    All tokens without an expert bid for the one they like best at its price, by how much they like it more than the
    next (Bertsekas); an expert keeps its highest bids, and the lowest of them is its price. At the end, who has none
    takes a place that is left. An auction that ends within `rounds` is within least_bid times T of the optimum; on
    1,024 tokens and 64 uneven experts of normal affinities 64 rounds reach 97 % of it, 512 all but 0.1 %.
    Use: balance without a loss, at one expert a token. Non-causal in training, hence `allow_noncausal`; evaluation is
    not balanced.
    Cost: `rounds` passes over [T, E], each with a sort of T; on a CPU over the rows of those who still bid, until
    nobody does: the same assignment.
    """

    def __init__(self, options: BaseOptions, context: MoEContext) -> None:
        if context.num_experts_per_tok != 1:
            raise ConfigError(
                f"takes one expert a token, and the layout says num_experts_per_tok {context.num_experts_per_tok}; "
                "sinkhorn balances more"
            )
        refuse_noncausal(context, "the assignment balances all tokens of the micro-batch against each other")
        super().__init__(options, context)
        self.causal = False  # in training; evaluation looks at each token alone
        self.rounds, self.least_bid = options.rounds, options.least_bid

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> one expert for each token."""
        logits = self.logits(x)
        scores = self.score(logits, sigmoid_score)
        if info.training:
            expert = balanced_assignment(logits.detach(), info.valid(), self.rounds, self.least_bid)
        else:
            expert = logits.detach().argmax(-1)
        weight = self.round_weight(scores.gather(1, expert[:, None]))
        return Routing.from_topk(
            expert[:, None], weight, self.num_experts, scores=scores, logits=logits, token_mask=info.mask
        )

    def qwen2_moe_fields(self) -> str:
        return "its weights are sigmoids, and Qwen2-MoE takes a softmax"


def balanced_assignment(value: Tensor, valid: Tensor, rounds: int, least_bid: float) -> Tensor:
    """value [T, E], valid [T] -> expert [T] int64, at most ceil(valid / E) valid tokens for each.

    Tokens that are not valid take their best, and no place.
    """
    tokens, experts = value.shape
    best = value.argmax(-1) if tokens else value.new_zeros(0, dtype=torch.int64)
    if experts == 1 or tokens == 0:
        return best
    places = (valid.sum() + experts - 1) // experts
    price = value.new_zeros(experts)
    expert, bid = torch.full_like(best, experts), value.new_zeros(tokens)  # `experts`: none
    compacts = waiting_is_free(value)  # to learn who still bids, and that nobody does
    everyone = torch.arange(tokens, device=value.device)
    for _ in range(rounds):
        bidding = valid & (expert == experts)
        who = everyone[bidding] if compacts else everyone
        if len(who) == 0:
            break
        first, second, wanted = _best_two(value[who] - price)
        bid[who] = torch.where(bidding[who], price[wanted] + first - second + least_bid, bid[who])
        expert[who] = torch.where(bidding[who], wanted, expert[who])
        rank = _rank(expert, bid, valid, experts)
        kept = valid & (rank < places)
        # The lowest bid that an expert keeps, once it is full: of the token whose rank is the last.
        last = torch.where(kept & (rank == places - 1), expert, experts)
        price = torch.cat([price, price[:1]]).scatter(0, last, bid)[:experts]
        expert = torch.where(kept, expert, experts)
    left = valid & (expert == experts)
    held = torch.zeros(experts + 1, dtype=torch.int64, device=value.device)
    held = held.index_add_(0, expert, torch.ones_like(expert))[:experts]
    free = (places - held).cumsum(0)
    nth = torch.where(left, left.cumsum(0) - 1, 0)
    found = torch.searchsorted(free, nth, right=True).clamp_max(experts - 1)
    return torch.where(valid, torch.where(left, found, expert), best)


def _best_two(gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gain [B, E] -> its largest [B], the next [B], and whose the largest is. A third of the time of topk on a CPU."""
    first, wanted = gain.max(-1)
    second = gain.scatter(1, wanted[:, None], -torch.inf).amax(-1)
    return first, second, wanted


def _rank(expert: Tensor, bid: Tensor, valid: Tensor, experts: int) -> Tensor:
    """How many higher bids there are for the same expert; who has none is behind all."""
    there = valid & (expert < experts)
    order = torch.argsort(bid, descending=True, stable=True)
    rank = rank_in_expert(expert.clamp_max(experts - 1), there, order, experts)
    return torch.where(there, rank, expert.numel())


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("base", BaseOptions, Base)]
