"""What `blocked_attention` computes, by the kernels that torch compiles for an accelerator: FlexAttention.

Whatever ends a query's sight (a document's start, a window, the border of a chunk), the keys that it scores with one of
its queries lie between a first and a last one. So two numbers a query say all: from them follow, by arithmetic on the
device, which blocks of keys a block of queries meets and which it sees whole. Nothing of S x S is made, and the host
waits for nothing. Parts that are scored with queries of their own are computed apart and merged by their LSEs.

Source: Flex Attention (2412.05496) 3 for block masks and full blocks; torch.nn.attention.flex_attention, whose kernels
these are and whose BlockMask is filled here. Merging: FlashDecoding's, as in 2412.05496; the gradient goes through the
LSEs too, so that it is that of one softmax over all keys.
B sequences, H query heads in G groups of one key head each, S queries, P positions before them, L = P + S, d head size.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo import exc as compiling
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from moelab.nn.blocked_attention import LEAST_ROWS, View

logger = logging.getLogger("moelab")
BLOCK = 128  # of queries, and of keys: what the kernels' own blocks divide
SMALLEST_HEAD = 16  # of a product in Triton (torch/_inductor/kernel/flex/flex_attention.py)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILATIONS = 64  # of one function: dtypes, heads, with gradients and without, parts, one length and any


class Span(NamedTuple):
    """The keys that each query scores with one of its queries."""

    first: Tensor  # [B, S] int32
    last: Tensor  # [B, S] int32; before the first one: none
    numbers: tuple[Tensor, Tensor] | None  # [B, S] and [B, L] int32: of those between, only keys of the own number
    blocks: tuple[Tensor, ...]  # BlockMask's eight, int32: count [B, 1, blocks], indices [B, 1, blocks, others]


Attend = Callable[[Tensor, Tensor, Tensor, Span, bool], tuple[Tensor, Tensor | None]]  # as `attend`


def serves(query: Tensor, view: View, width: int | None = None) -> bool:
    """Whether the kernels compute `query` [B, H, S, d]; a few new tokens after many are one block, and stay so.

    `width`: of a value head; None: d.
    """
    if (
        min(query.shape[-1], width or query.shape[-1]) < SMALLEST_HEAD
        or view.seq <= LEAST_ROWS
        or _dtype(query) not in DTYPES
    ):
        return False
    return _compiler() and _kind(query) not in _refused


def flexed_attention(
    queries: Sequence[Tensor], key: Tensor, value: Tensor, view: View, sinks: Tensor | None = None
) -> Tensor | None:
    """As `blocked_attention`, in the query's dtype, under autocast in autocast's; None: it can't be compiled here."""
    query, dtype = queries[0], _dtype(queries[0])
    with torch.autocast(query.device.type, enabled=False):
        spans = spans_of(view, query.device)[: len(queries)]
        run = merged if torch.compiler.is_compiling() else _compiled()
        try:
            out = run(tuple(each.to(dtype) for each in queries), key.to(dtype), value.to(dtype), spans, sinks)
        except (compiling.TorchDynamoException, compiling.FailOnRecompileLimitHit) as error:
            _refused.add(_kind(query))
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning("attention: torch can't compile FlexAttention, so it runs in blocks, slowly: %s", reason)
            return None
    return out.to(query.dtype)


def merged(
    queries: tuple[Tensor, ...],
    key: Tensor,
    value: Tensor,
    spans: tuple[Span, ...],
    sinks: Tensor | None = None,
    by: Attend | None = None,
) -> Tensor:
    """One softmax over the keys of all spans, each scored with its query: [B, H, S, d] each -> [B, H, S, d].

    `sinks` [H]: as `nn.sinks`, a span more, without values. `by` computes one span; None: `attend`.
    """
    by = by or attend
    if len(spans) == 1 and sinks is None:
        return by(queries[0], key, value, spans[0], False)[0]
    outs, sums = [], []
    for query, span in zip(queries, spans, strict=True):
        out, lse = by(query, key, value, span, True)
        assert lse is not None
        outs.append(out)
        sums.append(torch.where((span.last < span.first)[:, None], float("-inf"), lse))
    if sinks is not None:
        sums.append(sinks.to(sums[0].dtype)[:, None].expand_as(sums[0]))
    weights = torch.stack(sums).softmax(0)[..., None]  # fp32; each query sees itself, so that not all are -inf
    total = weights[0] * outs[0]
    for weight, out in zip(weights[1 : len(outs)], outs[1:], strict=True):
        total = total + weight * out
    return total.to(value.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, span: Span, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d)) v over the keys of a span, [B, H, S, d]; 0 where there are none, and the LSE -inf.

    The mask is made here, from tensors that come as inputs: compiled once, it serves whatever they hold.
    """
    first, last = span.first, span.last
    if span.numbers is None:

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= first[b, q]) & (k <= last[b, q])

    else:
        own, numbers = span.numbers

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= first[b, q]) & (k <= last[b, q]) & (numbers[b, k] == own[b, q])

    kv, kv_full, q, q_full = (span.blocks[at : at + 2] for at in range(0, 8, 2))
    mask = BlockMask(
        seq_lengths=(query.shape[2], key.shape[2]), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees,
        kv_num_blocks=kv[0], kv_indices=kv[1], full_kv_num_blocks=kv_full[0], full_kv_indices=kv_full[1],
        q_num_blocks=q[0], q_indices=q[1], full_q_num_blocks=q_full[0], full_q_indices=q_full[1],
    )  # fmt: skip
    more: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if with_lse else {}
    found = flex_attention(
        query, key, value, block_mask=mask, enable_gqa=True, kernel_options={"BACKEND": "TRITON"}, **more
    )
    return (found[0], found[1].lse) if with_lse else (found, None)


def spans_of(view: View, device: torch.device) -> tuple[Span, ...]:
    """The spans of `view`'s queries: of the own chunk, the one before and the others, or one of all. Made once."""
    if not view.spans:
        length = view.past + view.seq
        numbers = None
        if view.torn is not None:
            numbers = (view.torn[:, view.past :].int().contiguous(), view.torn.int().contiguous())
        for first, last in _ends(view, device):
            ends = (first.int().contiguous(), last.int().contiguous())
            view.spans.append(Span(*ends, numbers, block_lists(first, last, length, numbers)))
    return tuple(view.spans)


def _ends(view: View, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """First and last keys, [B, S] int64 each, of the spans that something may lie in."""
    past, length = view.past, view.past + view.seq
    index = torch.arange(past, length, device=device).expand(view.batch, -1)
    start = torch.zeros_like(index) if view.starts is None else view.starts[:, past:]
    nearest = start if view.window is None else torch.maximum(start, index - (view.window - 1))
    if view.chunk is None:
        return [(nearest, index)]
    own = index - (index - start) % view.chunk  # where the chunk begins
    before = own - view.chunk
    ends = [(torch.maximum(nearest, own), index), (torch.maximum(nearest, before), own - 1), (nearest, before - 1)]
    return ends[: (length - 1) // view.chunk + 1]


def block_lists(
    first: Tensor, last: Tensor, length: int, numbers: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Blocks of keys that a block of queries meets, then those seen whole, and the same from the keys' side.

    first, last [B, S] as `Span`'s; length L. Each a count [B, 1, blocks] and the indices [B, 1, blocks, others], int32.
    Met are all from the first key that any of the block's queries sees to the last; whole is a block that all see, so
    never one that sticks out over S or L.
    """
    none, rows, columns = last < first, -(-first.shape[1] // BLOCK), -(-length // BLOCK)
    first, last = (_blocks(e.masked_fill(none, out), out) for e, out in ((first, length), (last, -1)))
    begin = torch.arange(0, columns * BLOCK, BLOCK, device=first.device)
    end = begin + BLOCK - 1
    met = (first.amin(-1, keepdim=True) <= end) & (last.amax(-1, keepdim=True) >= begin)  # [B, rows, columns]
    whole = (first.amax(-1, keepdim=True) <= begin) & (last.amin(-1, keepdim=True) >= end)
    if numbers is not None:
        (low, high), (key_low, key_high) = (
            (blocks.amin(-1), blocks.amax(-1)) for blocks in (_blocks(each, 0) for each in numbers)
        )
        alike = (low == high)[:, :, None] & (key_low == key_high)[:, None]
        whole &= alike & (low[:, :, None] == key_low[:, None])
    assert met.shape[1:] == (rows, columns)
    partly = met & ~whole
    return (*_listed(partly), *_listed(whole), *_listed(partly.mT), *_listed(whole.mT))


def _blocks(each: Tensor, beyond: int) -> Tensor:
    """[B, S] -> [B, blocks, BLOCK], filled up with `beyond`."""
    return nn.functional.pad(each, (0, -each.shape[1] % BLOCK), value=beyond).unflatten(1, (-1, BLOCK))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, rows, columns] bool -> how many each row has, [B, 1, rows], and which, first in [B, 1, rows, columns]."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None].contiguous(), order.int()[:, None].contiguous()


_refused: set[tuple[torch.dtype, int, int]] = set()  # what could not be compiled


def _kind(query: Tensor) -> tuple[torch.dtype, int, int]:
    return _dtype(query), query.shape[-1], query.shape[1]


def _dtype(query: Tensor) -> torch.dtype:
    """What it is computed in: autocast's dtype, as by torch's own attention, or the query's."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@cache
def _compiler() -> bool:
    """Whether this machine compiles kernels: Triton is there, and the C compiler that it asks for."""
    missing = None
    if find_spec("triton") is None:
        missing = "triton"
    elif not any(map(shutil.which, filter(None, (os.environ.get("CC"), "clang", "gcc", "cc")))):
        missing = "a C compiler (CC, clang or gcc)"
    if missing is not None:
        logger.warning("attention: FlexAttention needs %s, which is missing; it runs in blocks, slowly", missing)
    return missing is None


@cache
def _compiled() -> Callable[..., Tensor]:
    """`merged`, compiled: for the first length as it is, from the second one on for any."""
    # A loss's share in the routers' gradient is a backward pass that keeps the graph, for which no buffer may be given.
    torch._functorch.config.donated_buffer = False
    # Beyond the limit, eight as torch ships it, a whole graph is refused.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    compiled: Callable[..., Tensor] = torch.compile(merged, fullgraph=True)
    return compiled
