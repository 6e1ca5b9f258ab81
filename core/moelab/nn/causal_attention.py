"""Causal attention for training on a CPU: blocks of queries against the keys they may see, as batched products.

torch's own CPU kernel computes the whole square in its backward pass and the scores a second time. Measured in
benchmarks/cpu_parts.py, forward and backward: 1.3 to 1.7 times as fast at 256 and 512 positions, in fp32 1.2 to 1.4 at
1024, where torch's kernel is faster in bf16.
B sequences, H query heads in G groups of one key head each, S positions, d head size, v that of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moelab.derivatives import first_order
from moelab.nn.sinks import sunk_softmax

MOST_POSITIONS, MOST_POSITIONS_HALF = 1024, 768  # beyond, torch's kernel is about as fast and keeps no weights
KEEP_ELEMENTS = 1 << 24  # attention weights kept for the backward pass: 64 MB a layer; beyond, they are computed again
LEAST_ELEMENTS = 1 << 19  # scores; below, one call of torch's kernel costs less than many small products
BLOCK_ROWS = 128  # of a product: queries of one block times query heads of a group
BATCH_ELEMENTS = 1 << 19  # scores computed at once: 2 MB, which the last level of cache holds


def blocks_pay(query: Tensor) -> bool:
    """Whether `causal_attention` is the faster way for query [B, H, S, d]: on a CPU, of middling size."""
    batch, heads, seq, _ = query.shape
    most = MOST_POSITIONS if query.dtype.itemsize >= 4 else MOST_POSITIONS_HALF
    return query.device.type == "cpu" and seq <= most and batch * heads * seq * seq >= LEAST_ELEMENTS


def can_choose(query: Tensor) -> bool:
    """Whether a measurement may decide: on a CPU, of sizes where either way was seen to win, or nearly so."""
    batch, heads, seq, _ = query.shape
    near = seq <= 3 * MOST_POSITIONS and batch * heads * seq * seq >= LEAST_ELEMENTS // 8
    return (
        near and query.device.type == "cpu" and not isinstance(query, FakeTensor) and not torch.compiler.is_compiling()
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
    """query [B, H, S, d], key [B, G, S, d], value [B, G, S, v] -> [B, H, S, v] in the query's dtype, in fp32 or wider.

    Half-width inputs are widened: fp32 blocks are faster than torch's kernel in bf16, and no score is
    rounded. `sinks` [H]: as `nn.sinks`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        sinks = None if sinks is None else sinks.to(wide)
        out: Tensor = _CausalAttention.apply(query.to(wide), key.to(wide), value.to(wide), sinks)
    return out.to(query.dtype)


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v. With p the weights: dv = p^T dy, ds = p (dy v^T - rowsum), dq = ds k, dk = ds^T q."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        batch, heads, seq, width = query.shape
        key, value = key.contiguous(), value.contiguous()  # each block reads a view then
        grouped = (query * width**-0.5).view(batch, key.shape[1], -1, seq, width)  # [B, G, H / G, S, d]
        out = query.new_empty(batch, seq, *grouped.shape[1:3], value.shape[-1])  # the order in which o_proj reads it
        keep = any(ctx.needs_input_grad) and batch * heads * seq * (seq + BLOCK_ROWS) // 2 <= KEEP_ELEMENTS
        share = None if sinks is None else grouped.new_empty(*grouped.shape[:4], 1)
        kept = []
        for block in _blocks(grouped):
            weights = block.weights(grouped, key, sinks, share)
            block.write(out.permute(0, 2, 3, 1, 4), torch.bmm(weights, block.keys(value)))
            if keep:
                kept.append(weights)
        ctx.save_for_backward(grouped, key, value, sinks, share, *kept)
        return out.view(batch, seq, heads, -1).transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grouped, key, value, sinks, share, *kept = ctx.saved_tensors
        dy = grads[0].view(*grouped.shape[:-1], -1)
        dquery = torch.empty_like(grouped)
        dkey, dvalue = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
        taken = None if share is None else torch.empty_like(share)
        for index, block in enumerate(_blocks(grouped)):
            weights = kept[index] if kept else block.weights(grouped, key, sinks, None)
            dout = block.queries(dy)
            dweights = torch.bmm(dout, block.keys(value).transpose(1, 2))
            if taken is not None:  # what each query takes from its sink
                block.write(taken, block.queries(share) * torch.linalg.vecdot(dweights, weights).unsqueeze(-1))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            block.write(dquery, torch.bmm(dscores, block.keys(key)))
            block.keys(dkey).baddbmm_(dscores.transpose(1, 2), block.queries(grouped))
            block.keys(dvalue).baddbmm_(weights.transpose(1, 2), dout)
        batch, groups, shared, seq, width = grouped.shape
        dsinks = None if taken is None else -taken.sum((0, 3, 4)).view(-1)
        return dquery.mul_(width**-0.5).view(batch, groups * shared, seq, width), dkey, dvalue, dsinks


class _Block:
    """Queries `rows` of the sequences `batch`: N = sequences * G products of H / G * queries rows."""

    def __init__(self, batch: slice, rows: slice) -> None:
        self.batch, self.rows = batch, rows

    def queries(self, grouped: Tensor) -> Tensor:
        """[B, G, H / G, S, d] -> [N, H / G * queries, d]."""
        part = grouped[self.batch, :, :, self.rows]
        return part.reshape(-1, part.shape[2] * part.shape[3], part.shape[4])

    def keys(self, each: Tensor) -> Tensor:
        """[B, G, S, d] -> [N, keys, d], a view where `each` is contiguous."""
        return each[self.batch].flatten(0, 1)[:, : self.rows.stop]

    def weights(self, grouped: Tensor, key: Tensor, sinks: Tensor | None, share: Tensor | None) -> Tensor:
        """Softmax over the keys that each query may see: [N, H / G * queries, keys]; what sinks take, into `share`."""
        scores = torch.bmm(self.queries(grouped), self.keys(key).transpose(1, 2))
        count = self.rows.stop - self.rows.start
        later = torch.full((count, count), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        scores.view(scores.shape[0], -1, count, scores.shape[2])[..., self.rows.start :] += later
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.view(1, grouped.shape[1], -1, 1, 1).expand(len(grouped), -1, -1, grouped.shape[3], -1)
        weights, taken = sunk_softmax(scores, self.queries(column))
        if share is not None:
            self.write(share, taken)
        return weights

    def write(self, grouped: Tensor, values: Tensor) -> None:
        """values [N, H / G * queries, d] into their place in [B, G, H / G, S, d]."""
        place = grouped[self.batch, :, :, self.rows]
        place.copy_(values.view(place.shape))


def _blocks(grouped: Tensor) -> Iterator[_Block]:
    """All queries, in the same order at each call."""
    batch, groups, shared, seq, _ = grouped.shape
    count = max(BLOCK_ROWS // 2, BLOCK_ROWS // shared)
    together = max(1, BATCH_ELEMENTS // (groups * shared * count * seq))
    for first in range(0, batch, together):
        for start in range(0, seq, count):
            yield _Block(slice(first, min(first + together, batch)), slice(start, min(start + count, seq)))
