"""Sigmoid scores with auxiliary-loss-free balancing: DeepSeek-V3's router."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, MoEContext, Router, component, hookimpl
from moelab.moe.selection import sigmoid_score
from moelab.moe.topk import TopKOptions, TopKRouter


@dataclass
class SigmoidTopKOptions(TopKOptions):
    norm_topk_prob: bool = True
    balance: str = "bias"
    group_score: str = "top2"


class SigmoidTopK(TopKRouter):
    """Sigmoid scores; the K largest of score + bias; weights from the scores alone.

    Formula: s = sigmoid(W x), S = top-K(s + b), w_i = s_i / (sum_S s + 1e-20) * routed_scaling_factor; after each
    optimizer step b_i += bias_update_rate * sign(mean load - load_i).
    Source: DeepSeek-V3 (2412.19437) 2.1.2 and 4.2, aux-loss-free balancing (2408.15664). V3: n_group 8, topk_group 4,
    routed_scaling_factor 2.5, and a rate of 0 for the last 500B of 14.8T tokens (bias_schedule). The step is centred,
    as torchtitan does, where the paper's is not. balance=quantile: Kimi K3 (2607.24653) 2.3.3.
    Use: balance without a loss that pulls against the language model; many fine-grained experts.
    Cost: as softmax_topk, and one all-reduce of E counts a step.
    """

    def __init__(self, options: SigmoidTopKOptions, context: MoEContext) -> None:
        super().__init__(options, context, sigmoid_score)

    def qwen2_moe_fields(self) -> str:
        return "its scores are sigmoids, and Qwen2-MoE takes a softmax"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("sigmoid_topk", SigmoidTopKOptions, SigmoidTopK)]
