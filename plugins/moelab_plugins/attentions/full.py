"""Every earlier position."""

from __future__ import annotations

from dataclasses import dataclass

from moelab import Component, component, hookimpl
from moelab.nn.attention_inputs import AttentionContext, AttentionKernel
from moelab.nn.full_attention import FullAttention


@dataclass
class FullOptions:
    """None."""


def full(options: FullOptions, context: AttentionContext) -> AttentionKernel:
    """Every earlier position of the same document.

    Formula: softmax(q_i k_j / sqrt(d)) over j <= i, q and k turned by their positions.
    Source: Vaswani et al. (1706.03762) 3.2.1 (section not opened); grouped heads of 2305.13245 (not opened);
    Qwen2 (2407.10671) 2.2.1.
    Use: the baseline.
    Cost: S^2 / 2 scores a head; memory grows with S.
    """
    return FullAttention(context.layer_id)


@hookimpl
def moelab_attentions() -> list[Component[AttentionContext, AttentionKernel]]:
    return [component("full", FullOptions, full)]
