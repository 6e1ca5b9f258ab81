"""A bias on the selection of experts, moved after each optimizer step so that their loads even out.

It decides who is chosen and never enters the weights, so the language model's loss does not feel it.
T tokens, E experts, K experts per token, M histogram bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

METHODS = ("none", "bias", "proportional", "quantile")
BINS = 1000  # of a histogram of margins, K3's number
FINEST, WIDEST = 1e-4, 16.0  # margins: bins are even below the first and geometric up to the second
_REACH = math.asinh(WIDEST / FINEST)  # bins are even in asinh(margin / FINEST), from -_REACH to _REACH


def sign_update(bias: Tensor, counts: Tensor, rate: float, centred: bool) -> Tensor:
    """b_i + u * sign(mean load - load_i), auxiliary-loss-free balancing (2408.15664): [E] fp32, [E] -> [E] fp32.

    `centred` takes the mean off the step (torchtitan): only differences choose, and a drifting sum costs digits.
    """
    load = counts.to(bias.device, torch.float32)
    step = torch.sign(load.mean() - load)
    if centred:
        step = step - step.mean()
    return bias + rate * step


def proportional_update(bias: Tensor, counts: Tensor, rate: float, target: float | None = None) -> Tensor:
    """b_i + u * (target - load_i), loads as shares of all choices: bias [N], counts [E'] int64, N <= E' -> [N] fp32.

    LongCat-Flash (2509.01322; its equation read in notes on the report): target K_e / (K N) for each of N experts, of
    which a token is to take K_e of its K choices; what else can be chosen has no bias. Without one all E' are even.
    A batch without tokens moves nothing.
    """
    load = counts.to(bias.device, torch.float32)
    total = load.sum()
    wanted = 1 / len(load) if target is None else target
    return bias + rate * (wanted - load[: len(bias)] / total.clamp_min(1)) * (total > 0)


def margin_histogram(scores: Tensor, bias: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """How far each expert is from being chosen: the share of tokens in each bin, [E * M] fp32, every M summing to one.

    The margin of token t for expert i is s_ti + b_i less the (K + 1)-th largest of s_t + b: positive for who is
    chosen. Shares average over micro-batches and ranks to those of the whole batch, which quantiles do not.
    scores [T, E], bias [E], mask [T].
    """
    biased = scores.detach().float() + bias
    cutoff = biased.topk(min(top_k + 1, biased.shape[1]), dim=-1).values[:, -1:]  # [T, 1]
    return histogram(biased - cutoff, mask)


def histogram(margins: Tensor, mask: Tensor | None) -> Tensor:
    """The share of tokens in each bin of each expert's margins [T, E], without padding: [E * M] fp32."""
    tokens, experts = margins.shape
    place = (torch.asinh(margins.float() / FINEST) / _REACH + 1) * (BINS / 2)
    place = place.long().clamp(0, BINS - 1) + BINS * torch.arange(experts, device=margins.device)
    real = torch.ones(tokens, device=margins.device) if mask is None else mask.float()
    counted = torch.zeros(experts * BINS, device=margins.device)
    counted.index_add_(0, place.reshape(-1), real.repeat_interleave(experts, output_size=tokens * experts))
    return counted / real.sum().clamp_min(1)


def exceeded(shares: Tensor, experts: int, wanted: float) -> Tensor:
    """The margin that a share `wanted` of the tokens exceeds, read off a `histogram`, linear within a bin: [E] fp32.

    NaN where there were no tokens.
    """
    from_top = shares.to(torch.float64).view(experts, BINS).flip(1)
    passed = from_top.cumsum(1)
    wanted -= 2e-7  # shares are fp32: one exactly at the quantile has reached it
    index = (passed < wanted).sum(1, keepdim=True).clamp_max(BINS - 1)
    inside = from_top.gather(1, index)
    part = ((wanted - (passed.gather(1, index) - inside)) / inside.clamp_min(1e-12)).clamp(0, 1)
    place = _REACH * (1 - (index + part) * (2 / BINS))
    margin = (FINEST * torch.sinh(place)).squeeze(1).float()
    return torch.where(passed[:, -1] > 0, margin, float("nan"))


def quantile_update(bias: Tensor, shares: Tensor, top_k: int, ema: float) -> Tensor:
    """The bias [E] under which the batch would have been balanced, from `margin_histogram`'s shares [E * M].

    Quantile balancing, Kimi K3 (2607.24653) 2.3.3: b_i = -quantile_{1 - K/E} over t of (s_ti - cutoff_t), read off a
    histogram that is pooled over the whole batch, linear within a bin; then centred. `ema` of the old bias stays.
    Theirs are 1,000 even bins of sigmoid margins; here they lie around the bias in use and are finest there, so that
    scores of any scale, a softmax over many experts say, settle to 2.5 % of what is left to correct.
    Megatron-Core does the same to logits, and takes the mean of the micro-batches' quantiles.
    """
    margin = exceeded(shares.to(bias.device), len(bias), top_k / len(bias))
    found = torch.where(margin.isnan(), bias, bias - margin)  # no token: nothing was learnt
    blended = ema * bias + (1 - ema) * found
    return blended - blended.mean()
