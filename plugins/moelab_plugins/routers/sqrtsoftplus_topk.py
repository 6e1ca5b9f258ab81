"""Scores sqrt(softplus(W x)): unbounded above, gentle below."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, MoEContext, Router, component, hookimpl
from moelab.moe.selection import sqrt_softplus_score
from moelab.moe.topk import TopKOptions, TopKRouter


@dataclass
class SqrtSoftplusTopKOptions(TopKOptions):
    norm_topk_prob: bool = True
    balance: str = "bias"
    group_score: str = "top2"


class SqrtSoftplusTopK(TopKRouter):
    """Square root of softplus scores; the K largest of score + bias.

    Formula: s = sqrt(log(1 + exp(W x))), S = top-K(s + b), w_i = s_i / sum_S s * routed_scaling_factor.
    Source: DeepSeek-V4 as implemented in Megatron-Core (`sqrtsoftplus`).
    Use: where sigmoid scores saturate near one and the best experts can't be told apart.
    Cost: as sigmoid_topk. Scores are floored at 1e-15, where their own gradient would be 0 / 0.
    """

    def __init__(self, options: SqrtSoftplusTopKOptions, context: MoEContext) -> None:
        super().__init__(options, context, sqrt_softplus_score)

    def qwen2_moe_fields(self) -> str:
        return "its scores are square roots of softplus, and Qwen2-MoE takes a softmax"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("sqrtsoftplus_topk", SqrtSoftplusTopKOptions, SqrtSoftplusTopK)]
