"""Steps that many routers share: score functions, group limits, and assignments from a map.

T tokens, E experts, G groups, N assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.errors import ConfigError

GROUP_SCORES = ("max", "top2", "topk")


def softmax_score(logits: Tensor) -> Tensor:
    """[T, E] -> [T, E], each token's scores summing to one."""
    return logits.softmax(-1)


def sigmoid_score(logits: Tensor) -> Tensor:
    """[T, E] -> [T, E] in 0 .. 1, experts apart from each other."""
    return logits.sigmoid()


def sqrt_softplus_score(logits: Tensor) -> Tensor:
    """[T, E] -> sqrt(softplus(logits)), floored so that its gradient sigmoid / (2 score) is never 0 / 0."""
    return torch.nn.functional.softplus(logits).clamp_min(1e-30).sqrt()


def normalise(weight: Tensor) -> Tensor:
    """[T, K] -> divided by its sum over K; all zeros stay zeros."""
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-20)  # 1e-20: DeepSeek-V3


def group_limit(scores: Tensor, n_group: int, topk_group: int, group_score: str, top_k: int) -> Tensor:
    """scores [T, E] -> [T, E] with -inf outside each token's best `topk_group` of `n_group` groups.

    A group scores its largest member (DeepSeek-V2, 2405.04434), the sum of its two largest (V3, 2412.19437), or of its
    top_k / topk_group largest (Megatron). -inf and not 0: biased scores can be negative.
    """
    tokens, experts = scores.shape
    grouped = scores.view(tokens, n_group, experts // n_group)
    members = {"max": 1, "top2": 2, "topk": max(1, top_k // topk_group)}[group_score]
    members = min(members, experts // n_group)
    group = grouped.topk(members, dim=-1).values.sum(-1)  # [T, G]
    kept = torch.zeros_like(group, dtype=torch.bool).scatter_(1, group.topk(topk_group, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(tokens, experts)


def check_groups(num_experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    """Raise ConfigError for groups that don't divide the experts or can't hold the choices."""
    if num_experts % n_group:
        raise ConfigError(f"n_group: {n_group} does not divide num_experts {num_experts}")
    if topk_group > n_group:
        raise ConfigError(f"topk_group: {topk_group} exceeds n_group {n_group}")
    if topk_group * (num_experts // n_group) < top_k:
        raise ConfigError(
            f"topk_group: {topk_group} groups of {num_experts // n_group} experts hold fewer than "
            f"num_experts_per_tok {top_k}"
        )


def assignments_of_map(served: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """served [T, E] bool, with at most `limit` True -> token, expert [limit] int64 and valid [limit] bool.

    In token order, the True ones first; the rest fills up so that the shape is known without asking the device.
    """
    flat = served.reshape(-1)
    order = torch.argsort(flat.to(torch.uint8), descending=True, stable=True)[:limit]
    experts = served.shape[1]
    return order // experts, order % experts, flat.index_select(0, order)
