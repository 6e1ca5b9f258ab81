"""Choosing tokens instead of experts: the best C tokens of each sequence, and the causal threshold that stands in.

B sequences of S positions, T = B * S tokens, E columns (experts, or one for "process this token").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moelab.moe.routing import TokenInfo


def choose_tokens(scores: Tensor, info: TokenInfo, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """For each column, the ceil(share * length) highest tokens of each sequence; padding is never chosen.

    scores [T, E] -> token [B, C, E] int64, served [B, C, E] bool, threshold [E]: the lowest score that was chosen,
    averaged over sequences. C counts padding, so the shape is known; what is over the real length is not served.
    """
    batch, length = info.sequence_shape()
    columns = scores.shape[1]
    capacity = min(length, capacity_of(length, share))
    if capacity == 0:
        empty = torch.zeros(batch, 0, columns, dtype=torch.int64, device=scores.device)
        return empty, empty.bool(), scores.new_zeros(columns)
    masked = scores.detach()
    valid = info.valid().view(batch, length)
    masked = masked.masked_fill(~info.valid().unsqueeze(-1), float("-inf")).view(batch, length, columns)
    best = masked.topk(capacity, dim=1)  # [B, C, E]
    limit = torch.ceil(valid.sum(1).double() * share - 1e-9).long()  # [B]
    limit = torch.minimum(limit, valid.sum(1))
    served = torch.arange(capacity, device=scores.device)[None, :] < limit[:, None]  # [B, C]
    start = torch.arange(batch, device=scores.device)[:, None, None] * length
    # of the last one served; sequences of padding alone have none
    last = best.values.gather(1, (limit - 1).clamp_min(0)[:, None, None].expand(batch, 1, columns)).squeeze(1)
    real = (limit > 0).to(scores.dtype)
    last = torch.where(limit[:, None] > 0, last, torch.zeros_like(last))
    threshold = last.sum(0) / real.sum().clamp_min(1)
    return best.indices + start, served.unsqueeze(-1).expand(batch, capacity, columns), threshold


def capacity_of(length: int, share: float) -> int:
    """ceil(share * length), at least one."""
    return max(1, math.ceil(length * share - 1e-9))
