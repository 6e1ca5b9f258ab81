"""A bias on the selection of experts, moved after each optimizer step so that their loads even out.

It decides who is chosen and never enters the weights, so the language model's loss does not feel it.
T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("none", "bias", "quantile")


def sign_update(bias: Tensor, counts: Tensor, rate: float, centred: bool) -> Tensor:
    """b_i + u * sign(mean load - load_i), auxiliary-loss-free balancing (2408.15664): [E] fp32, [E] -> [E] fp32.

    `centred` takes the mean off the step (torchtitan): only differences choose, and a drifting sum costs digits.
    """
    load = counts.to(bias.device, torch.float32)
    step = torch.sign(load.mean() - load)
    if centred:
        step = step - step.mean()
    return bias + rate * step


def quantile_bias(scores: Tensor, bias: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """The bias under which this batch would have been balanced, one pass of quantile balancing (Megatron 33706f9).

    With beta = -bias: alpha_t is the (K+1)-th largest of s_t - beta, beta_i the (T K / E + 1)-th largest over t of
    s_ti - alpha_t. scores [T, E], bias [E], mask [T] -> [E] fp32.
    """
    tokens, experts = scores.shape
    scores = scores.detach().float()
    if tokens == 0:
        return bias.clone()
    alpha = (scores + bias).topk(min(top_k + 1, experts), dim=-1).values[:, -1:]  # [T, 1]
    margin = scores - alpha
    real = torch.full((), tokens, dtype=torch.int64, device=scores.device)
    if mask is not None:
        margin = margin.masked_fill(~mask.unsqueeze(-1), float("-inf"))
        real = mask.sum()
    place = (real * top_k // experts).clamp(max=tokens - 1)
    beta = margin.sort(dim=0, descending=True).values.gather(0, place.expand(1, experts)).squeeze(0)
    return torch.where(torch.isfinite(beta), -beta, bias)


def quantile_update(bias: Tensor, found: Tensor, ema: float) -> Tensor:
    """Blend the batch's bias [E] into the old one and centre it."""
    blended = ema * bias + (1 - ema) * found.to(bias.device, torch.float32)
    return blended - blended.mean()
