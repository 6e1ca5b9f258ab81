"""How much weight the top-k experts of an untrained router get, and how a factor on the output is spread."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from moelab.initialisers import MATRICES
from moelab_upcycling.streams import stream, unit_quantiles

_TOKENS = 4096
PLACEMENTS = ("down", "up_down", "all")


@cache
def top_k_mass(num_experts: int, num_experts_per_tok: int, logit_std: float, norm_topk_prob: bool) -> float:
    """E[sum of the K largest of softmax(N independent N(0, logit_std^2) logits)], over a fixed sample of 4096."""
    if norm_topk_prob or num_experts_per_tok == num_experts:
        return 1.0
    raw = stream(0, "top_k_mass/1", 0, "logits").random_raw(_TOKENS * num_experts // 4 + 1).view(np.uint16)
    logits = logit_std * unit_quantiles()[raw[: _TOKENS * num_experts]].reshape(_TOKENS, num_experts)
    weight = np.sort(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)
    return float((weight[:, -num_experts_per_tok:].sum(axis=1) / weight.sum(axis=1)).mean())


def spread(factor: float, placement: str, power_of_two: bool) -> dict[str, float]:
    """A factor on an expert's output as factors on its matrices. Only `down` and `up_down` are exact: silu bends."""
    if power_of_two and factor > 0:  # a shifted exponent: copies stay bit-identical but for the scale
        factor = 2.0 ** round(math.log2(factor))
    if placement == "down":
        return {"down": factor}
    if placement == "up_down":
        return {"up": factor**0.5, "down": factor**0.5}
    return dict.fromkeys(MATRICES, factor ** (1 / 3))
