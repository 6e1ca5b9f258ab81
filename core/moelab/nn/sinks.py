"""Attention sinks: a learned logit a head that takes part in each query's softmax and has no value.

p_j = exp(s_j) / (exp(z) + sum_k exp(s_k)): what the sink z takes goes to no key, so that a head may look at nothing.
Source: gpt-oss (transformers 5.23, models/gpt_oss/modeling_gpt_oss.py: `sinks`, `eager_attention_forward`, which joins
z to the scores and drops its weight). StreamingLLM (2309.17453, abstract opened) names what heads without one do,
attending to the first tokens for want of another place; with z = 0 it is "softmax off by one" (E. Miller, not opened).

Weights need no joined scores: with lse = ln sum_k exp(s_k) the sink's share is sigmoid(z - lse), and the keys' weights
are their softmax times the rest. In the gradient the sink's value is zero, so that softmax's own backward formula holds
for the keys as it stands, with dz = -share * sum_k p_k dp_k.
B sequences, H query heads in G groups of one key head each, S queries, L keys, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelab.derivatives import first_order
from moelab.nn.fused_parts import by_groups, kernel


def sunk_softmax(scores: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """scores [..., keys], sinks [..., 1] -> weights of the keys, of the scores' shape, and the sink's share [..., 1].

    A row must have a key that is seen.
    """
    weights = scores.softmax(-1)
    # The largest weight is 1 / sum_k exp(s_k - largest): no exponential is computed twice.
    lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.mul_(torch.sigmoid(lse - sinks)), torch.sigmoid(sinks - lse)


def all_pairs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """query [B, H, S, d], key and value [B, G, L, d], mask as `AttentionInputs.mask`, sinks [H] -> [B, H, S, d].

    By torch's plain operations, with all S x L scores: for few queries. Computed in fp32 or wider.
    """
    batch, heads, seq, width = query.shape
    wide, groups = torch.promote_types(query.dtype, torch.float32), key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        own = query.to(wide).reshape(batch, groups, -1, width)  # those of a group as if they were positions
        scores = (own @ key.to(wide).mT * width**-0.5).view(batch, heads, seq, -1)
        if mask is None and seq > 1:
            mask = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        column = sinks.to(wide)[:, None, None].expand(batch, -1, seq, -1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        out = weights.reshape(batch, groups, -1, weights.shape[-1]) @ value.to(wide)
    return out.view(batch, heads, seq, width).to(query.dtype)


def fused_causal(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    """Causal attention by torch's own CPU kernel (`fused_parts.kernel`): [B, H, S, d] -> [B, H, S, d].

    In the widest of their types, as the kernel takes one alone: under autocast normed heads are wider than values.
    """
    wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    out: Tensor = _FusedCausal.apply(query.to(wide), key.to(wide), value.to(wide), sinks)
    return out.to(query.dtype)


class _FusedCausal(torch.autograd.Function):
    """The kernel gives lse, and its backward pass asks for it: told the sum with the sink's, it computes that softmax.

    It takes p = exp(s - lse) and ds = p (dp - dy . out), both of which are right with the sink in lse and out.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        own, keys, values = by_groups(query, key, value)
        out, lse = kernel()(own, keys, values, 0.0, True)  # [B G, H / G, S, d], [B G, H / G, S]
        total = torch.logaddexp(lse, _columns(sinks, key, lse))
        out = out.mul_((lse - total).exp().unsqueeze(-1).to(out.dtype))
        ctx.save_for_backward(query, key, value, sinks, out, total)
        return out.reshape(query.shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        own, keys, values = by_groups(query, key, value)
        dy = grads[0].reshape(out.shape)
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dquery, dkeys, dvalues = back(dy, own, keys, values, out, total, 0.0, True)
        delta = (dy * out).sum(-1, dtype=total.dtype)
        dsinks = -((_columns(sinks, key, total) - total).exp() * delta).sum(-1)  # [B G, H / G]
        dkey, dvalue = (each.sum(1).reshape(key.shape) for each in (dkeys, dvalues))
        return dquery.reshape(query.shape), dkey, dvalue, dsinks.reshape(-1, len(sinks)).sum(0).to(sinks.dtype)


def _columns(sinks: Tensor, key: Tensor, like: Tensor) -> Tensor:
    """sinks [H] -> [B G, H / G, 1], in the type of `like`."""
    batch, groups = key.shape[:2]
    return sinks.to(like.dtype).view(groups, -1, 1).repeat(batch, 1, 1)
