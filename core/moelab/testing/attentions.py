"""What every attention must do. B sequences, S positions, H query heads, G key heads, d head size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelab.components import Component
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs, AttentionKernel, TurnedKernel
from moelab.nn.kv_cache import KVCache
from moelab.nn.positional_promises import attention_built
from moelab.nn.rope import Rope, rotate
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.tensors import assert_close, assert_finite

SEQUENCE, BATCH = 53, 2  # no multiple of any chunk or window
LENGTHS = (19, 1, 20, 13)  # of documents packed into one sequence: they add up to SEQUENCE
CONTEXT = AttentionContext(
    head_dim=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_id=0,
    num_hidden_layers=1,
    max_position_embeddings=16,
)
# (queries [n, 1], keys [1, n], positions within a document) -> how far away each query takes each key to be, which keys
# it sees, and what its scores are multiplied with; all [n, n], or what broadcasts to it
Definition = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Heads = tuple[Tensor, Tensor, Tensor]


@dataclass
class AttentionCase:
    """One attention under test, in layer 0. `definition`: its scores, from positions alone, if it turns by RoPE."""

    component: Component[AttentionContext, AttentionKernel]
    options: Any = None
    context: AttentionContext = CONTEXT
    definition: Definition | None = None
    rope: Rope = field(default_factory=lambda: Rope(CONTEXT.head_dim, 100.0))

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> AttentionKernel:
        return self.component.build(self.options, self.context)

    def heads(self, seq: int = SEQUENCE, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Heads:
        """query [B, H, S, d], key and value [B, G, S, d], seeded; scores of some size."""
        stream = torch.Generator().manual_seed(seq)
        heads = self.context.num_attention_heads, *(self.context.num_key_value_heads,) * 2
        query, key, value = (torch.randn(batch, h, seq, self.context.head_dim, generator=stream) for h in heads)
        return (2 * query).to(dtype), key.to(dtype), value.to(dtype)

    def inputs(self, heads: Any, **more: Any) -> AttentionInputs:
        """What a forward pass over these heads shares; `past` positions lie before them."""
        batch, _, seq, _ = heads[0].shape
        past = more.get("past", 0)
        positions = torch.arange(past, past + seq).expand(batch, seq)
        if more.get("documents") is not None:
            more["documents"] = more["documents"].expand(batch, -1)
            bare = AttentionInputs(self.rope, positions, heads[0].dtype, **more)
            positions = bare.key_positions[:, past:]
        return AttentionInputs(self.rope, positions, heads[0].dtype, **more)

    def run(self, heads: Any, **more: Any) -> Tensor:
        """-> [B, H, S, d]."""
        query, key, value = heads
        return self.build()(query, key, value, self.inputs(heads, **more))

    @property
    def serves_sinks(self) -> bool:
        return bool(getattr(self.build(), "serves_sinks", False))

    def oracle(self, heads: Any, documents: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        """The definition over all pairs, in float64. documents [S]; sinks [H], a score more whose value is 0."""
        assert self.definition is not None
        query, key, value = (part.double() for part in heads)
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        seq = query.shape[2]
        index = torch.arange(seq)
        own = torch.zeros_like(index) if documents is None else documents
        start = torch.stack([(own == name).nonzero()[0, 0] for name in own])
        place = index - start
        distance, sees, scale = self.definition(place[:, None], place[None, :])
        sees = sees & (index[:, None] >= index) & (own[:, None] == own)
        frequencies, factor = self.rope.frequencies(query.device, seq)
        angle = distance[..., None].double() * frequencies.double()  # [n, n, d / 2]
        (q1, q2), (k1, k2) = query.chunk(2, -1), key.chunk(2, -1)
        even = q1[..., :, None, :] * k1[..., None, :, :] + q2[..., :, None, :] * k2[..., None, :, :]
        odd = q1[..., :, None, :] * k2[..., None, :, :] - q2[..., :, None, :] * k1[..., None, :, :]
        scores = (even * angle.cos() + odd * angle.sin()).sum(-1) * factor**2 * query.shape[-1] ** -0.5
        scores = (scores * scale).masked_fill(~sees, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(len(scores), -1, seq, 1)], -1)
        return scores.softmax(-1)[..., :seq] @ value


def returns_the_shape_and_dtype_of_the_query(case: AttentionCase) -> None:
    """In float32 and bfloat16, for many tokens and for one, whose only key is its own: it returns its value."""
    promised(attention_built(case.build()), case.component.build)
    for dtype in (torch.float32, torch.bfloat16):
        for seq in (SEQUENCE, 1):
            heads = case.heads(seq, dtype=dtype)
            out = case.run(heads)
            assert out.shape == heads[0].shape, f"output of shape {tuple(out.shape)}, not {tuple(heads[0].shape)}"
            assert out.dtype == dtype, f"output in {out.dtype}, not {dtype}"
            assert_finite(out, "output")
    share = case.context.num_attention_heads // case.context.num_key_value_heads
    heads = case.heads(1)
    assert_close(case.run(heads), heads[2].repeat_interleave(share, 1), "one token alone", 1e-6)


def what_follows_changes_nothing(case: AttentionCase) -> None:
    """Causality, and the prefix property: the first tokens alone give what they give in a longer text."""
    heads = case.heads()
    whole = case.run(heads)
    for seq in (1, 7, 16, 17, 33, 52):
        part = tuple(each[:, :, :seq] for each in heads)
        assert_close(case.run(part), whole[:, :, :seq], f"the first {seq} tokens, alone and followed", 1e-5)


def a_cache_continues_the_text(case: AttentionCase) -> None:
    """Token by token, and in blocks, as in one pass; what the cache holds stays as it is."""
    heads, kernel = case.heads(), case.build()
    whole = case.run(heads)
    for sizes in ([1] * SEQUENCE, [20, 1, 32], [16, 16, 21]):
        cache, past, parts = KVCache(1), 0, []
        for size in sizes:
            before = None if past == 0 else cache.held(0)[0].clone()
            query, key, value = part = tuple(each[:, :, past : past + size] for each in heads)
            parts.append(kernel(query, key, value, case.inputs(part, past=past, cache=cache)))
            past += size
            held = cache.held(0)[0]
            assert held.shape[2] == past, f"the cache holds {held.shape[2]} positions of {past}"
            assert held.shape[1] == heads[1].shape[1], "the cache holds a key for each query head, not for each group"
            if before is not None:
                assert torch.equal(held[:, :, : before.shape[2]], before), "a cached key changes when tokens follow"
        assert_close(torch.cat(parts, 2), whole, f"in blocks of {sorted(set(sizes))} over a cache", 1e-5)


def a_group_shares_its_key(case: AttentionCase) -> None:
    """Grouped heads are the same as a copy of key and value for each."""
    query, key, value = case.heads()
    share = query.shape[1] // key.shape[1]
    copies = (query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1))
    assert_close(case.run((query, key, value)), case.run(copies), "with and without grouped heads", 1e-5)


def padding_changes_nothing(case: AttentionCase) -> None:
    """To the left or to the right of a text; and what padding gives is finite."""
    heads = case.heads(31)
    alone = case.run(heads)
    for left, right in ((9, 0), (0, 9), (4, 5)):
        real = torch.tensor([[False] * left + [True] * 31 + [False] * right] * BATCH)
        padded = tuple(torch.nn.functional.pad(each, (0, 0, left, right), value=3.0) for each in heads)
        out = case.run(padded, padding=real)
        assert_finite(out, "the output of padding")
        found = out[:, :, left : left + 31]
        assert_close(found, alone, f"with {left} of padding before and {right} behind", 1e-4)


def documents_are_apart(case: AttentionCase) -> None:
    """Packed into one sequence each gives what it gives alone, and no gradient crosses a border; with padding too."""
    heads = tuple(each.requires_grad_() for each in case.heads())
    documents = torch.repeat_interleave(torch.tensor([3, 7, 1, 4]), torch.tensor(LENGTHS))[None]
    packed = case.run(heads, documents=documents)
    begin = 0
    for length in LENGTHS:
        alone = case.run(tuple(each[:, :, begin : begin + length] for each in heads))
        assert_close(packed[:, :, begin : begin + length], alone, f"a document of {length} packed and alone", 1e-4)
        begin += length
    first = LENGTHS[0]
    for found in torch.autograd.grad(packed[:, :, first:].square().sum(), heads):
        assert not found[:, :, :first].any(), "the gradient of later documents reaches the first one"
    real = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    real[:, -LENGTHS[-1] :] = False
    padded = case.run(heads, documents=documents, padding=real)
    assert_close(padded[:, :, : -LENGTHS[-1]], packed[:, :, : -LENGTHS[-1]], "with padding for the last document", 1e-5)


def its_gradients_are_those_of_its_output(case: AttentionCase) -> None:
    """In float64 against a step along a random direction, so that detached or approximate ones show."""
    heads = tuple(each.requires_grad_() for each in case.heads(37, 1, torch.float64))
    stream = torch.Generator().manual_seed(5)
    weight = torch.randn(heads[0].shape, generator=stream, dtype=torch.float64)
    found = torch.autograd.grad((case.run(heads) * weight).sum(), heads)
    for name, index in (("query", 0), ("key", 1), ("value", 2)):
        step = torch.randn(heads[index].shape, generator=stream, dtype=torch.float64)
        ends = []
        for sign in (1.0, -1.0):
            moved = [each.detach() for each in heads]
            moved[index] = moved[index] + sign * 1e-5 * step
            ends.append(float((case.run(tuple(moved)) * weight).sum()))
        slope, expected = float((found[index] * step).sum()), (ends[0] - ends[1]) / 2e-5
        scale = max(abs(expected), float(found[index].norm() * step.norm()) * 1e-2)
        assert abs(slope - expected) <= 1e-4 * scale, (
            f"the gradient of the {name} says {slope:.6g}, a step {expected:.6g}"
        )


def equals_its_definition(case: AttentionCase) -> None:
    """Where one is declared: output and gradients against all pairs in float64, for one document and for several.

    And with attention sinks, where it serves them.
    """
    if case.definition is None:
        return
    packed = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    drawn = torch.linspace(-2.0, 3.0, case.context.num_attention_heads, dtype=torch.float64).requires_grad_()
    for sinks, documents in itertools.product((None, drawn) if case.serves_sinks else (None,), (None, packed)):
        heads = tuple(each.requires_grad_() for each in case.heads(dtype=torch.float64))
        leaves = heads if sinks is None else (*heads, sinks)
        weight = torch.randn(heads[0].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        out = case.run(heads, documents=None if documents is None else documents[None], sinks=sinks)
        expected = case.oracle(heads, documents, sinks)
        assert_close(out, expected, "against all pairs in float64", 1e-5)  # tables are in float32
        found = torch.autograd.grad((out * weight).sum(), leaves)
        wanted = torch.autograd.grad((expected * weight).sum(), leaves)
        for name, one, other in zip(("query", "key", "value", "sinks")[: len(leaves)], found, wanted, strict=True):
            assert_close(one, other, f"the gradient of the {name}, against all pairs in float64", 1e-4)


def what_it_shows_are_its_weights(case: AttentionCase) -> None:
    """Where it calls `inputs.look`: every query of every head once, with weights that sum to one; same output."""
    heads = case.heads()
    batch, count, seq = heads[0].shape[:3]
    shown = torch.zeros(batch, seq)

    def look(layer_id: int, sequences: slice, rows: slice, weights: Tensor) -> None:
        assert layer_id == case.context.layer_id, f"shown as of layer {layer_id}, not {case.context.layer_id}"
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]), "sums of the weights shown", 1e-5)
        shown[sequences, rows] += weights.shape[1]

    out = case.build()(*heads, case.inputs(heads, look=look))
    if shown.any():
        wrong = f"of {count} heads, the queries of {sorted(set(shown.flatten().tolist()))} were shown"
        assert bool((shown == count).all()), wrong
        assert_close(out, case.run(heads), "looked at, and not", 1e-5)


def sinks_take_their_share(case: AttentionCase) -> None:
    """Where it serves them: what a sink z leaves is for the keys, in their proportions, and its odds are exp(z).

    Of one text, of documents, beside padding and over a cache; and the gradient of z is that of the output.
    """
    if not case.serves_sinks:
        return
    heads, kernel = case.heads(), case.build()
    query, key, value = heads
    sinks = torch.linspace(-2.0, 3.0, query.shape[1])
    real = (torch.arange(SEQUENCE) >= 9).expand(BATCH, -1)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    for form in ({}, {"documents": documents}, {"padding": real}):
        what = f"with sinks, {' and '.join(form) or 'one text'}"
        found = case.run(heads, sinks=sinks, **form)
        left, less = (
            case.run((query, key, torch.ones_like(value)), sinks=each, **form)[..., :1] for each in (sinks, sinks + 1)
        )
        assert_close(found, case.run(heads, **form) * left, f"{what}: the keys' proportions", 1e-4)
        assert_close((1 / less - 1), (1 / left - 1) * math.e, f"{what}: the odds of a sink one larger", 1e-3)
        none = case.run(heads, sinks=sinks - 1e4, **form)
        assert_close(none, case.run(heads, **form), f"{what}: of no size", 1e-5)
    whole, cache, parts = case.run(heads, sinks=sinks), KVCache(1), []
    for past, size in ((0, 20), (20, 1), (21, 32)):
        part = tuple(each[:, :, past : past + size] for each in heads)
        parts.append(kernel(part[0], part[1], part[2], case.inputs(part, past=past, cache=cache, sinks=sinks)))
    assert_close(torch.cat(parts, 2), whole, "with sinks, over a cache", 1e-5)
    wide = case.heads(dtype=torch.float64)
    leaf = sinks.double().requires_grad_()
    weight = torch.randn(wide[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((case.run(wide, sinks=leaf) * weight).sum(), leaf)
    ends = [(case.run(wide, sinks=leaf.detach() + step) * weight).sum((0, 2, 3)) for step in (1e-5, -1e-5)]
    assert_close(gradient, (ends[0] - ends[1]) / 2e-5, "the gradient of the sinks, against a step", 1e-4)


def what_is_turned_already_gives_the_same(case: AttentionCase) -> None:
    """Where it has `on_turned`: as when called, in every form; and values narrower and wider than keys pass it whole.

    With a cache it is given all keys, and appends nothing.
    """
    kernel = case.build()
    if not isinstance(kernel, TurnedKernel):
        return
    heads = query, key, value = case.heads()
    forms: dict[str, dict[str, Any]] = {
        "one text": {},
        "documents": {"documents": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]},
        "padding": {"padding": (torch.arange(SEQUENCE) >= 9).expand(BATCH, -1)},
    }
    if case.serves_sinks:
        forms["sinks"] = {"sinks": torch.linspace(-2.0, 3.0, query.shape[1])}
    for what, form in forms.items():
        inputs = case.inputs(heads, **form)
        own, keys = (rotate(each, *inputs.rotation()) for each in (query, key))
        whole = case.run(heads, **form)
        assert_close(kernel.on_turned(own, keys, value, inputs), whole, f"on_turned, {what}", 1e-5)
        wide = torch.cat([value, value[..., :3].neg()], -1)
        for width in (5, wide.shape[-1]):
            found = kernel.on_turned(own, keys, wide[..., :width], case.inputs(heads, **form))
            wanted = torch.cat([whole, whole[..., :3].neg()], -1)[..., :width]
            assert_close(
                found, wanted, f"on_turned with values of {width} beside keys of {key.shape[-1]}, {what}", 1e-5
            )
    cache, whole = KVCache(1), case.run(heads)
    for past, size in ((0, 20), (20, 1), (21, 32)):
        query, key, value = part = tuple(each[:, :, past : past + size] for each in heads)
        kernel(query, key, value, case.inputs(part, past=past, cache=cache))
        inputs = case.inputs(part, past=past, cache=cache)
        found = kernel.on_turned(rotate(query, *inputs.rotation()), *cache.held(0), inputs)
        assert_close(found, whole[:, :, past : past + size], f"on_turned, {size} after {past} that are cached", 1e-5)
        held = cache.held(0)[0].shape[2]
        assert held == past + size, f"on_turned leaves {held} positions in a cache that had {past + size}"


ATTENTION_CHECKS: tuple[Callable[[AttentionCase], None], ...] = (
    returns_the_shape_and_dtype_of_the_query,
    what_follows_changes_nothing,
    a_cache_continues_the_text,
    a_group_shares_its_key,
    padding_changes_nothing,
    documents_are_apart,
    its_gradients_are_those_of_its_output,
    equals_its_definition,
    what_it_shows_are_its_weights,
    sinks_take_their_share,
    what_is_turned_already_gives_the_same,
)


def check_attention(
    component: Component[AttentionContext, AttentionKernel],
    options: Any = None,
    definition: Definition | None = None,
) -> None:
    """Run every check of ATTENTION_CHECKS; raises ConformanceError naming those that fail."""
    case = AttentionCase(component, options, definition=definition)
    run_checks("attention", component, case, ATTENTION_CHECKS)
