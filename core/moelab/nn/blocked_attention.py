"""Attention in blocks of queries, each against the keys that it may see: memory grows with S, not with its square.

What a query sees (`View`) may end at a document's border or at a window, and keys may be scored with one of several
queries by how far away they lie, as Dual Chunk Attention does: one softmax over all of them, and exact gradients.
B sequences, H query heads in G groups of one key head each, S queries, P positions before them, L = P + S, d head size,
v that of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelab.derivatives import first_order
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.fused_parts import chunked_attention, fused_pays
from moelab.nn.sinks import sunk_softmax

BLOCK_ROWS = 256  # of a product: queries of one block times query heads of a group
KEEP_ELEMENTS = 1 << 22  # attention weights kept for the backward pass: 16 MB a layer; beyond, they are computed again
BATCH_ELEMENTS = 1 << 19  # scores computed at once, where one block has fewer: 2 MB
LEAST_ROWS = 16
Look = Callable[[slice, slice, Tensor], None]


@dataclass(frozen=True)
class Part:
    """Keys that are scored with one of the queries."""

    query: int
    keys: slice
    chosen: bool = False  # only those in the chunks that lie `query` chunks back (2: or more)


@dataclass(frozen=True)
class Block:
    """Queries `rows` of the sequences `batch`, of the groups `groups`, against `keys`."""

    batch: slice
    groups: slice
    rows: slice
    keys: slice
    parts: tuple[Part, ...]
    masked: bool  # whether some of the keys belong to others


@dataclass(frozen=True)
class View:
    """Which keys each query sees, and with which query it scores them."""

    batch: int
    past: int  # P
    seq: int  # S
    window: int | None = None  # keys that a query sees, itself included; None: all
    chunk: int | None = None  # keys of the own chunk of positions, the one before, and others have a query each
    segments: Tensor | None = None  # as AttentionInputs'
    starts: Tensor | None = None  # [B, L] int64: the first position that a query of each position may see
    chunks: Tensor | None = None  # [B, L] int64, with segments: the chunk that each position lies in
    torn: Tensor | None = None  # `segments` where padding may lie among the keys of a sequence, as `starts` can't say
    laid: dict[tuple[int, int], list[Block]] = field(default_factory=dict)
    spans: list[Any] = field(default_factory=list)  # what `flex_attention` made of it

    @classmethod
    def of(cls, inputs: AttentionInputs, window: int | None = None, chunk: int | None = None) -> View:
        """What `inputs` lets a query see."""
        batch, seq = inputs.positions.shape
        segments = inputs.segments
        if segments is None:
            return cls(batch, inputs.past, seq, window, chunk)
        positions = inputs.key_positions
        starts = torch.arange(inputs.length, device=positions.device) - positions
        chunks = None if chunk is None else positions // chunk
        torn = segments if inputs.documents is None else None
        return cls(batch, inputs.past, seq, window, chunk, segments, starts, chunks, torn)

    def fuses(self, query: Tensor, *, training: bool) -> bool:
        """Whether torch's kernel computes the forward pass of query [B, H, S, d]: see `fused_parts`.

        In training not where the weights of blocks would be kept for the backward pass.
        """
        if self.chunk is None or self.segments is not None or self.window is not None or not fused_pays(query):
            return False
        return not training or query.shape[0] * query.shape[1] * self.seq * (self.past + self.seq) // 2 > KEEP_ELEMENTS

    def blocks(self, groups: int, shared: int) -> list[Block]:
        """All queries, for `groups` key heads of `shared` query heads each."""
        key = (groups, shared)
        if key not in self.laid:
            self.laid[key] = list(self._blocks(groups, shared))
        return self.laid[key]

    def _blocks(self, groups: int, shared: int) -> Iterator[Block]:
        for rows in self._rows(shared):
            first = 0 if self.window is None else max(0, self.past + rows.start - self.window + 1)
            elements = shared * (rows.stop - rows.start) * (self.past + rows.stop - first)
            together = max(1, BATCH_ELEMENTS // max(elements, 1))
            for batch, some in _units(self.batch, groups, together):
                yield self._block(batch, some, rows, first)

    def _rows(self, shared: int) -> Iterator[slice]:
        """Queries of one block; without segments they lie in one chunk."""
        start = 0
        while start < self.seq:
            wide = self.past + start if self.window is None else min(self.window, self.past + start)
            count = max(LEAST_ROWS, min(BLOCK_ROWS // shared, 2 * BATCH_ELEMENTS // (shared * (wide + 1))))
            stop = min(start + count, self.seq)
            if self.chunk is not None and self.segments is None:
                stop = min(stop, ((self.past + start) // self.chunk + 1) * self.chunk - self.past)
            yield slice(start, stop)
            start = stop

    def _block(self, batch: slice, groups: slice, rows: slice, first: int) -> Block:
        begin, end = self.past + rows.start, self.past + rows.stop
        masked = self.starts is not None
        if self.starts is not None and self.starts.device.type == "cpu":  # known at no cost: an accelerator would wait
            starts = self.starts[batch, begin:end]
            first = max(first, int(starts.min()))
            masked = self._has_padding or int(starts.max()) > first
        keys = slice(first, end)
        if self.chunk is None:
            return Block(batch, groups, rows, keys, (Part(0, keys),), masked)
        if self.chunks is not None:
            return Block(batch, groups, rows, keys, tuple(self._chosen(batch, rows, keys)), masked)
        own = begin // self.chunk * self.chunk
        borders = (max(first, own), max(first, own - self.chunk), first)
        ends = (end, borders[0], borders[1])
        parts = tuple(Part(q, slice(borders[q], ends[q])) for q in (2, 1, 0) if borders[q] < ends[q])
        return Block(batch, groups, rows, keys, parts, masked)

    @property
    def _has_padding(self) -> bool:
        return self.segments is not None and bool((self.segments < 0).any())

    def _chosen(self, batch: slice, rows: slice, keys: slice) -> Iterator[Part]:
        """The parts of a block in which documents meet, as narrow as can be known without waiting."""
        for query in range(min(3, (self.past + self.seq - 1) // (self.chunk or 1) + 1)):
            narrow = keys
            if self.segments is not None and self.segments.device.type == "cpu":
                there = self.choice(batch, rows, Part(query, keys)) & self.visible(batch, rows, keys)
                columns = there.any(1).any(0).nonzero()
                if not len(columns):
                    continue
                narrow = slice(keys.start + int(columns[0]), keys.start + int(columns[-1]) + 1)
            yield Part(query, narrow, chosen=True)

    def choice(self, batch: slice, rows: slice, part: Part) -> Tensor:
        """[b, rows, keys] bool: which keys of a part lie in the chunks that its query is for."""
        assert self.chunks is not None
        own = self.chunks[batch, self.past + rows.start : self.past + rows.stop, None]
        back = own - self.chunks[batch, None, part.keys]
        return back >= 2 if part.query == 2 else back == part.query

    def visible(self, batch: slice, rows: slice, keys: slice) -> Tensor:
        """[b, rows, keys] bool: which keys are of the query's own document, and none of padding."""
        assert self.segments is not None
        assert self.starts is not None
        own = slice(self.past + rows.start, self.past + rows.stop)
        same = self.segments[batch, own, None] == self.segments[batch, None, keys]
        index = torch.arange(keys.start, keys.stop, device=same.device)
        return same & (index >= self.starts[batch, own, None])


def blocked_attention(
    queries: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    view: View,
    look: Look | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """queries, each [B, H, S, d], key [B, G, L, d], value [B, G, L, v] -> [B, H, S, v] in the query's dtype.

    All turned already. One query, or with `view.chunk` three: for keys of the own chunk, of the one before, and of
    others; those that no key needs may be left out. Computed in fp32 or wider. `look` is shown the sequences, the rows
    and the weights [b, heads, rows, keys] of each block, and must not change them. `sinks` [H]: as `nn.sinks`.
    """
    dtype, wide = queries[0].dtype, torch.promote_types(queries[0].dtype, torch.float32)
    with torch.autocast(queries[0].device.type, enabled=False):
        sinks = None if sinks is None else sinks.to(wide)
        wider = (each.to(wide) for each in (key, value, *queries))
        out: Tensor = _Blocked.apply((view, look), sinks, *wider)
    return out.to(dtype)


class _Blocked(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v. With p the weights: dv = p^T dy, ds = p (dy v^T - rowsum), dq = ds k, dk = ds^T q."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[View, Look | None],
        sinks: Tensor | None,
        key: Tensor,
        value: Tensor,
        *queries: Tensor,
    ) -> Tensor:
        view, look = how
        batch, heads, seq, width = queries[0].shape
        # Scaled here and not with each query; contiguous, so that each block reads a view.
        key, value = (key * width**-0.5).contiguous(), value.contiguous()
        groups = key.shape[1]
        grouped = [query.unflatten(1, (groups, -1)) for query in queries]  # [B, G, H / G, S, d]
        ctx.view, ctx.queries = view, len(queries)
        if look is None and view.fuses(queries[0], training=any(ctx.needs_input_grad)):
            assert view.chunk is not None
            out, share = chunked_attention(queries, key, value, view.past, view.chunk, sinks)
            ctx.save_for_backward(sinks, None if share is None else share[..., None], key, value, *grouped)
            return out.transpose(1, 2)
        out = key.new_empty(batch, seq, groups, heads // groups, value.shape[-1])  # the order in which o_proj reads it
        share = None if sinks is None else key.new_empty(*grouped[0].shape[:4], 1)
        kept, room = [], KEEP_ELEMENTS if any(ctx.needs_input_grad) else 0
        for block in view.blocks(groups, heads // groups):
            weights, taken = _weights(view, block, grouped, key, sinks)
            if share is not None:
                _write(share, block, taken)
            if look is not None:
                look(block.batch, block.rows, _of_sequences(weights, block))
            _write(out.permute(0, 2, 3, 1, 4), block, torch.bmm(weights, _keys(value, block, block.keys)))
            room -= weights.numel()
            kept += [weights] if room >= 0 else []
        ctx.save_for_backward(sinks, share, key, value, *grouped, *kept)
        return out.view(batch, seq, heads, -1).transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sinks, share, key, value, *rest = ctx.saved_tensors
        grouped, kept = rest[: ctx.queries], rest[ctx.queries :]
        view, shape = ctx.view, grouped[0].shape
        dy = grads[0].reshape(*shape[:-1], -1)
        dqueries = [query.new_zeros(shape) for query in grouped]
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        given = None if share is None else torch.empty_like(share)  # by each query to its sink, negated
        for index, block in enumerate(view.blocks(shape[1], shape[2])):
            weights = kept[index] if index < len(kept) else _weights(view, block, grouped, key, sinks)[0]
            dout = _queries(dy, block)
            dweights = torch.bmm(dout, _keys(value, block, block.keys).transpose(1, 2))
            if given is not None:
                _write(given, block, _queries(share, block) * torch.linalg.vecdot(dweights, weights)[..., None])
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            for part in block.parts:
                own = _columns(dscores, block, part.keys)
                if part.chosen:
                    choice = view.choice(block.batch, block.rows, part)
                    own = (_by_head(own, choice) * choice[:, None, None]).view(own.shape)
                _write(dqueries[part.query], block, torch.bmm(own, _keys(key, block, part.keys)), add=True)
                _add(dkey, block, part.keys, own, _queries(grouped[part.query], block))
            _add(dvalue, block, block.keys, weights, dout)
        batch, groups, shared, seq, width = shape
        each = (d.view(batch, groups * shared, seq, width) for d in dqueries)
        dsinks = None if given is None else -given.sum((0, 3, 4)).view(-1)
        return None, dsinks, dkey.mul_(width**-0.5), dvalue, *each


def _weights(
    view: View, block: Block, grouped: Sequence[Tensor], key: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that each query may see: [N, H / G * rows, keys], N sequences times groups.

    And what sinks [H] take of it, [N, H / G * rows, 1]; nothing of use where there are none.
    """
    products = [
        torch.bmm(_queries(grouped[part.query], block), _keys(key, block, part.keys).transpose(1, 2))
        for part in block.parts
    ]
    if any(part.chosen for part in block.parts):
        shape = (*products[0].shape[:2], block.keys.stop - block.keys.start)
        scores = products[0].new_full(shape, float("-inf"))
        for part, product in zip(block.parts, products, strict=True):
            choice = view.choice(block.batch, block.rows, part)
            place = _by_head(_columns(scores, block, part.keys), choice)
            place.copy_(torch.where(choice[:, None, None], _by_head(product, choice), place))
    else:
        scores = products[0] if len(products) == 1 else torch.cat(products, -1)
    _hide(view, block, scores)
    if sinks is None:
        return scores.softmax(-1), scores
    column = sinks.view(1, grouped[0].shape[1], -1, 1, 1).expand(len(key), -1, -1, view.seq, -1)
    return sunk_softmax(scores, _queries(column, block))


def _hide(view: View, block: Block, scores: Tensor) -> None:
    """-inf in place of the scores [N, H / G * rows, keys] of keys that a query doesn't see."""
    rows, keys = block.rows, block.keys
    count, begin = rows.stop - rows.start, view.past + rows.start
    if count > 1:
        own = slice(begin, keys.stop)  # later ones among the block's own
        later = torch.full((count, count), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        place = _columns(scores, block, own)
        place.view(place.shape[0], -1, count, count).add_(later)
    if view.window is not None and begin + count - view.window > keys.start:
        early = slice(keys.start, begin + count - view.window)  # those that only the block's first queries see
        index = torch.arange(early.start, early.stop, device=scores.device)
        query = torch.arange(begin, begin + count, device=scores.device)
        gone = index <= query[:, None] - view.window
        place = _columns(scores, block, early)
        place.view(place.shape[0], -1, count, place.shape[2]).masked_fill_(gone, float("-inf"))
    if block.masked:
        seen = view.visible(block.batch, rows, keys)
        _by_head(scores, seen).masked_fill_(~seen[:, None, None], float("-inf"))


def _queries(grouped: Tensor, block: Block) -> Tensor:
    """[B, G, H / G, S, d] -> [N, H / G * rows, d]."""
    part = grouped[block.batch, block.groups, :, block.rows]
    return part.reshape(-1, part.shape[2] * part.shape[3], part.shape[4])


def _keys(each: Tensor, block: Block, keys: slice) -> Tensor:
    """[B, G, L, d] -> [N, keys, d], a view."""
    return each[block.batch, block.groups].flatten(0, 1)[:, keys]


def _columns(scores: Tensor, block: Block, keys: slice) -> Tensor:
    """The part of [N, ..., keys of the block] that belongs to `keys`."""
    return scores[..., keys.start - block.keys.start : keys.stop - block.keys.start]


def _by_head(scores: Tensor, mask: Tensor) -> Tensor:
    """[N, H / G * rows, keys] -> [b, g, H / G, rows, keys], a view; mask [b, rows, keys]."""
    batch, rows = mask.shape[:2]
    return scores.view(batch, scores.shape[0] // batch, scores.shape[1] // rows, rows, scores.shape[2])


def _of_sequences(weights: Tensor, block: Block) -> Tensor:
    """[N, H / G * rows, keys] -> [b, heads, rows, keys]."""
    sequences, rows = block.batch.stop - block.batch.start, block.rows.stop - block.rows.start
    return weights.view(sequences, -1, rows, weights.shape[2])


def _write(grouped: Tensor, block: Block, values: Tensor, *, add: bool = False) -> None:
    """values [N, H / G * rows, d] into, or onto, their place in [B, G, H / G, S, d]."""
    place = grouped[block.batch, block.groups, :, block.rows]
    if add:
        place.add_(values.view(place.shape))
    else:
        place.copy_(values.view(place.shape))


def _add(gradient: Tensor, block: Block, keys: slice, weights: Tensor, rows: Tensor) -> None:
    """weights^T rows, [N, keys, d], onto the gradient [B, G, L, d] of the keys."""
    _keys(gradient, block, keys).baddbmm_(weights.transpose(1, 2), rows)


def _units(batch: int, groups: int, together: int) -> Iterator[tuple[slice, slice]]:
    """(sequences, groups) of at most `together` products, or of one."""
    if together >= groups:
        step = together // groups
        for first in range(0, batch, step):
            yield slice(first, min(first + step, batch)), slice(0, groups)
        return
    for row in range(batch):
        for first in range(0, groups, together):
            yield slice(row, row + 1), slice(first, min(first + together, groups))
