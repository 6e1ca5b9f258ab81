"""Dual chunks by torch's own CPU kernel: a call for each part of what a chunk of queries sees, merged by their sums.

Parts of a softmax are added as softmax_p(lse_p) o_p, with o_p a part's output and lse_p the logarithm of the sum of its
exponentials: exact, as in FlashAttention (2205.14135) 3.1, whose blocks are merged so. A forward pass alone: the kernel
gives no gradient of lse_p, without which that of the merged output is wrong, so `blocked_attention` has the backward.
B sequences, H query heads in G groups of one key head each, S queries, P positions before them, L = P + S, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LEAST_QUERIES = 256  # fewer are as fast in blocks
_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # private: torch 2.11 to 2.13


def fused_pays(query: Tensor) -> bool:
    """Whether there is the kernel for query [B, H, S, d], and enough to do."""
    return _KERNEL is not None and query.device.type == "cpu" and query.shape[2] >= LEAST_QUERIES


def kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """torch's: (query, key, value, dropout, causal) -> [..., S, d], and the logarithm of each softmax's sum."""
    assert _KERNEL is not None
    found: Callable[..., tuple[Tensor, Tensor]] = _KERNEL
    return found


def by_groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, S, d], [B, G, L, d] -> [B G, H / G, S or L, d]: key heads are read by all of their group, uncopied."""
    groups, wide = key.shape[1], (-1, query.shape[1] // key.shape[1], -1, -1)
    keys, values = (each.flatten(0, 1)[:, None].expand(wide) for each in (key, value))
    return query.unflatten(1, (groups, -1)).flatten(0, 1), keys, values


def chunked_attention(
    queries: Sequence[Tensor], key: Tensor, value: Tensor, past: int, chunk: int, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """queries, each [B, H, S, d], key, scaled, and value [B, G, L, d] -> [B, S, H, d], as `blocked_attention`.

    `sinks` [H]: a part more, without a value; then also its share of each query's softmax, [B, G, H / G, S].
    """
    batch, heads, seq, width = queries[0].shape
    groups = key.shape[1]
    own = [by_groups(query, key, value)[0] for query in queries]
    _, keys, values = by_groups(queries[0], key, value)
    sink = None if sinks is None else sinks.to(key.dtype).view(groups, -1, 1, 1).repeat(batch, 1, 1, 1)
    out = key.new_empty(batch, seq, groups, heads // groups, width)
    share = None if sinks is None else key.new_empty(batch, groups, heads // groups, seq)
    for rows in _rows(past, seq, chunk):
        found = [
            _attend(own[query][:, :, rows], keys[:, :, part], values[:, :, part], causal=causal)
            for query, part, causal in _parts(past, rows, chunk)
        ]
        merged, left = _merged(found, sink)
        out[:, rows].permute(0, 2, 3, 1, 4).copy_(merged.unflatten(0, (batch, groups)))
        if share is not None and left is not None:
            share[..., rows] = left.unflatten(0, (batch, groups))
    return out.flatten(2, 3), share


def _rows(past: int, seq: int, chunk: int) -> Iterator[slice]:
    """Queries that lie in one chunk of positions."""
    start = 0
    while start < seq:
        stop = min(seq, ((past + start) // chunk + 1) * chunk - past)
        yield slice(start, stop)
        start = stop


def _parts(past: int, rows: slice, chunk: int) -> Iterator[tuple[int, slice, bool]]:
    """(which query, keys, causal) of what these queries see: themselves, their chunk, the one before, all others."""
    begin, end = past + rows.start, past + rows.stop
    first = begin // chunk * chunk
    before = max(0, first - chunk)
    yield 0, slice(begin, end), True
    for query, part in ((0, slice(first, begin)), (1, slice(before, first)), (2, slice(0, before))):
        if part.stop > part.start:
            yield query, part, False


def _attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """-> o [N, h, rows, d], and lse [N, h, rows, 1]."""
    found, sums = kernel()(query, key, value, 0.0, causal, scale=1.0)
    return found, sums[..., None]


def _merged(parts: Sequence[tuple[Tensor, Tensor]], sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-> o [N, h, rows, d], and the share [N, h, rows] of the sink [N, h, 1, 1]."""
    if len(parts) == 1 and sink is None:
        return parts[0][0], None
    more = [] if sink is None else [sink.expand(parts[0][1].shape)]
    shares = torch.cat([*(sums for _, sums in parts), *more], -1).softmax(-1)  # [N, h, rows, parts]
    out = parts[0][0] * shares[..., :1]
    for index, (found, _) in enumerate(parts[1:], start=1):
        out.addcmul_(found, shares[..., index : index + 1].to(found.dtype))
    return out, None if sink is None else shares[..., -1]
