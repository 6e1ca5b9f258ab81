"""Two experts, the second one by chance: GShard's router."""

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
from moelab.moe.gate import noise_generator
from moelab.moe.selection import softmax_score
from moelab.moe.topk import TopKOptions, TopKRouter


@dataclass
class GShardOptions(TopKOptions):
    norm_topk_prob: bool = True
    drop_policy: str = "position"
    random_second: bool = True  # in training the second expert serves with probability min(1, 2 w2)


class GShard(TopKRouter):
    """The best two experts; in training the second one serves with probability min(1, 2 w2).

    Formula: p = softmax(W x), S = top-2(p), w = p_S / sum p_S. Balance losses count first choices alone, so that
    load_balance is mean(m_e c_e) E^2.
    Source: GShard (2006.16668) 2.2 and algorithm 1, whose loss (line 13) has no E^2: that is mesh-tensorflow's and
    Switch's. Its capacity 2 N / (G E) is capacity_factor 1 here, as K = 2 counts; dropless here unless it is given.
    Use: to reproduce GShard; the random second expert saves compute on tokens that hardly want one.
    Cost: between one and two experts a token in training, two afterwards.
    """

    def __init__(self, options: GShardOptions, context: MoEContext) -> None:
        if context.num_experts_per_tok != 2:
            raise ConfigError(
                f"takes two experts a token, and the layout says num_experts_per_tok {context.num_experts_per_tok}"
            )
        super().__init__(options, context, softmax_score)
        self.balance_top_k = min(self.balance_top_k, 1)  # the first choice, by the scores alone where a bias moves it
        self.random_second = options.random_second

    @property
    def batch_invariant(self) -> bool:
        """Unless the second expert serves by chance."""
        return super().batch_invariant and not self.random_second

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """One, and the second with probability min(1, 2 w2); w2 as large as it can be: an undecided token."""
        second = 1.0
        if self.random_second:
            largest = (0.5 if self.norm_topk_prob else 1 / self.num_experts) * self.options.routed_scaling_factor
            second = min(1.0, 2 * largest)
        why = "1 + min(1, 2 w2) of an undecided router; towards 1 the surer it is" if self.random_second else "both"
        return replace(self.capacity.expected(1 + second, self.top_k, why), settled=not self.random_second)

    def thin(self, routing: Routing, info: TokenInfo) -> Routing:
        """Serve the second choices by chance, and show losses the first choices."""
        expert, weight = routing.expert.view(-1, 2), routing.weight.detach().view(-1, 2)
        first = torch.zeros(expert.shape[0], self.num_experts, dtype=torch.bool, device=expert.device)
        routing = replace(routing, choices=first.scatter_(1, expert[:, :1], True))
        if not (self.random_second and info.training):
            return routing
        drawn = torch.rand(
            weight.shape[0], device=weight.device, generator=noise_generator(info, self.layer_id, weight.device)
        )
        served: Tensor = torch.stack([torch.ones_like(drawn, dtype=torch.bool), drawn < 2 * weight[:, 1]], dim=1)
        return routing.serve(served.reshape(-1))

    def qwen2_moe_fields(self) -> dict[str, bool] | str:
        return self.plain_topk_differs() or {"norm_topk_prob": self.norm_topk_prob}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("gshard", GShardOptions, GShard)]
