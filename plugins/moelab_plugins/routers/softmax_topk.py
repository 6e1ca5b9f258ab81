"""Softmax over every expert, keep the K largest: Qwen2-MoE's router (and, renormalised, Mixtral's)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moelab import Component, MoEContext, Router, component, hookimpl
from moelab.moe.selection import softmax_score
from moelab.moe.topk import TopKOptions, TopKRouter


@dataclass
class SoftmaxTopKOptions(TopKOptions):
    topk_first: bool = False  # softmax over the K chosen logits alone (Mixtral, Megatron's default)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_first and self.balance != "none":
            raise ValueError(
                "balance needs topk_first=false: it biases scores, and topk_first has them for K experts only"
            )
        self.norm_topk_prob = self.norm_topk_prob or self.topk_first  # the same weights, and the same choice


class SoftmaxTopK(TopKRouter):
    """Softmax, then the K largest; or the K largest, then softmax.

    Formula: p = softmax(W x), S = top-K(p), w_i = p_i, or p_i / sum_S p with norm_topk_prob. With topk_first
    w = softmax of the chosen logits, which equals the normalised form in exact arithmetic.
    Source: Qwen2 report (2407.10671) 2.2.2; topk_first: Mixtral (2401.04088) 2.1 (section not opened).
    Use: the default, and what Qwen2-MoE checkpoints need. Add a balance loss, or `balance: bias`.
    Cost: one [T, D] x [D, E] product. With K = 1 and normalised weights the router gets no gradient from the
    language model's loss: the weight is always one.
    """

    options: SoftmaxTopKOptions

    def __init__(self, options: SoftmaxTopKOptions, context: MoEContext) -> None:
        super().__init__(options, context, softmax_score)

    def qwen2_moe_fields(self) -> dict[str, Any] | str:
        return self.plain_topk_differs() or {"norm_topk_prob": self.norm_topk_prob}


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("softmax_topk", SoftmaxTopKOptions, SoftmaxTopK)]
