"""Expert capacity: which assignments are served when an expert takes only so many.

T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.contracts import ExpectedAssignments, MoEContext
from moelab.moe.routing import Routing

POLICIES = ("probs", "position")


@dataclass(frozen=True)
class Capacity:
    """At most ceil(factor * K * T / E) tokens an expert, T counting no padding (GShard 2006.16668, Megatron-Core).

    The programs of Switch (mesh, flaxformer) round down or to the nearest and serve at least 4; here it is always up.

    `probs`: the heaviest assignments of an expert stay. `position`: first choices of all tokens in order, then second
    choices, as GShard does. What is dropped keeps no weight, and the rest is not renormalised.
    """

    training: float | None
    evaluation: float | None
    policy: str

    def expected(self, wanted: float, top_k: int, because: str) -> ExpectedAssignments:
        """What is served of `wanted` experts a token at perfect balance; an uneven load loses more."""
        if self.training is None or self.training * top_k >= wanted:
            return ExpectedAssignments(wanted, because)
        return ExpectedAssignments(self.training * top_k, "capacity_factor K, at perfect balance")

    def apply(self, routing: Routing, training: bool) -> Routing:
        """Serve what fits. routing must have `top_k` and gets `choices`, `served` and `dropped`."""
        factor = self.training if training else self.evaluation
        if factor is None:
            return routing
        assert routing.top_k is not None
        valid = torch.ones_like(routing.token, dtype=torch.bool)
        if routing.token_mask is not None:
            valid = routing.token_mask.index_select(0, routing.token)
        # fp64: ceil must not see 4.000001 where 4 is meant
        limit = torch.ceil(valid.sum().double() * factor / routing.num_experts - 1e-9).long()
        if self.policy == "probs":
            order = torch.argsort(routing.weight.detach(), descending=True, stable=True)
        else:
            index = torch.arange(routing.expert.numel(), device=routing.expert.device)
            order = index.view(-1, routing.top_k).t().reshape(-1)
        asked = valid if routing.served is None else valid & routing.served
        served = (rank_in_expert(routing.expert, asked, order, routing.num_experts) < limit) & asked
        dropped = (asked & ~served).sum()
        choices = routing.choice_map() if routing.choices is None else routing.choices
        counted = routing.counted_top_k  # decided before `choices` is set: what is dropped changes no scores
        return replace(routing.serve(served), choices=choices, dropped=dropped, balance_top_k=counted)


def rank_in_expert(expert: Tensor, valid: Tensor, order: Tensor, num_experts: int) -> Tensor:
    """How many valid assignments of the same expert come before each one in `order`: all [N] -> [N] int64.

    Invalid assignments rank among themselves.
    """
    bucket = torch.where(valid, expert, num_experts).index_select(0, order)
    by_bucket = torch.argsort(bucket, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    counts = counts.index_add_(0, bucket, torch.ones_like(bucket))
    first = counts.cumsum(0) - counts
    place = torch.arange(expert.numel(), device=expert.device)
    rank = torch.empty_like(place)
    rank[order[by_bucket]] = place - first[bucket[by_bucket]]
    return rank


def check_capacity(training: float | None, evaluation: float | None, policy: str) -> None:
    """Raise ValueError for options out of range."""
    if policy not in POLICIES:
        raise ValueError(f"drop_policy must be one of {', '.join(POLICIES)}, not '{policy}'")
    for key, value in (("capacity_factor", training), ("eval_capacity_factor", evaluation)):
        if value is not None and value <= 0:
            raise ValueError(f"{key} must be positive, not {value}; leave it out for dropless routing")


def refuse_noncausal(context: MoEContext, reason: str) -> None:
    """Raise ConfigError unless the config lets routers look at later tokens."""
    if not context.allow_noncausal:
        raise ConfigError(
            f"layer {context.layer_id}: {reason}, so a decoder would see the future in training and not in generation; "
            "set model.moe.allow_noncausal=true if that is what you want to study"
        )
