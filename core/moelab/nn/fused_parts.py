"""Dual chunks by torch's own CPU kernel: a call for each part of what a chunk of queries sees, merged by their sums.

Parts of a softmax are added as softmax_p(lse_p) o_p, with o_p a part's output and lse_p the logarithm of the sum of its
exponentials: exact, as in FlashAttention (2205.14135) 3.1, whose blocks are merged so. A forward pass alone: the kernel
gives no gradient of lse_p, without which that of the merged output is wrong, so `blocked_attention` has the backward.
B sequences, H query heads in G groups of one key head each, S queries, P positions before them, L = P + S, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LEAST_QUERIES = 256  # fewer are as fast in blocks
_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # private: torch 2.11 to 2.13


def fused_pays(query: Tensor) -> bool:
    """Whether there is the kernel for query [B, H, S, d], and enough to do."""
    return _KERNEL is not None and query.device.type == "cpu" and query.shape[2] >= LEAST_QUERIES


def chunked_attention(queries: Sequence[Tensor], key: Tensor, value: Tensor, past: int, chunk: int) -> Tensor:
    """queries, each [B, H, S, d], key, scaled, and value [B, G, L, d] -> [B, S, H, d], as `blocked_attention`."""
    batch, heads, seq, width = queries[0].shape
    groups = key.shape[1]
    # Key heads are read by all query heads of their group, without a copy of them.
    own = [query.unflatten(1, (groups, -1)).flatten(0, 1) for query in queries]  # [B G, H / G, S, d]
    wide = (-1, heads // groups, -1, -1)
    keys, values = (each.flatten(0, 1)[:, None].expand(wide) for each in (key, value))  # [B G, H / G, L, d]
    out = key.new_empty(batch, seq, groups, heads // groups, width)
    for rows in _rows(past, seq, chunk):
        found = [
            _attend(own[query][:, :, rows], keys[:, :, part], values[:, :, part], causal=causal)
            for query, part, causal in _parts(past, rows, chunk)
        ]
        out[:, rows].permute(0, 2, 3, 1, 4).copy_(_merged(found).unflatten(0, (batch, groups)))
    return out.flatten(2, 3)


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
    assert _KERNEL is not None
    found, sums = _KERNEL(query, key, value, 0.0, causal, scale=1.0)
    return found, sums[..., None]


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][0]
    shares = torch.cat([sums for _, sums in parts], -1).softmax(-1)  # [N, h, rows, parts]
    out = parts[0][0] * shares[..., :1]
    for index, (found, _) in enumerate(parts[1:], start=1):
        out.addcmul_(found, shares[..., index : index + 1].to(found.dtype))
    return out
