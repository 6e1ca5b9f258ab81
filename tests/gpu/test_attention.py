"""Attention under masks at length on the device: forward and gradients of the blocked way, by the device's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.blocked_attention import View, blocked_attention
from moelab.nn.full_attention import FullAttention
from moelab.nn.masked_attention import masked_attention
from moelab.nn.rope import Rope
from on_device import DEVICE, ON_GPU, full_precision, never_waiting, rehearsed

pytestmark = pytest.mark.gpu

LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 700, 4, 2, 64  # no multiple of a block
BORDERS = ((130, 256, 511), (5, 400, 401))  # where documents begin
CASES = {
    "documents": {"documents": True},
    "window": {"window": 200},
    "chunks": {"chunk": 150},
    "everything": {"documents": True, "window": 300, "chunk": 60},
    "padding": {"padding": True},
}


def view_of(
    length: int, documents: bool = False, padding: bool = False, past: int = 0, **ends: int
) -> tuple[View, int]:
    """Of two sequences, and how many queries it scores with."""
    index = torch.arange(length, device=DEVICE)
    begins = torch.tensor(BORDERS, device=DEVICE)
    inside = (index >= begins[..., None]).long().sum(1) if documents else None
    real = None
    if padding:  # before the second sequence, and in a hole of both
        real = (index >= torch.tensor([[0], [77]], device=DEVICE)) & ((index < 300) | (index >= 310))
    positions = index[past:].expand(2, -1)
    inputs = AttentionInputs(Rope(HEAD_DIM, 1e4), positions, torch.float32, past, documents=inside, padding=real)
    view = View.of(inputs, **ends)
    return view, 1 if view.chunk is None else min(3, (length - 1) // view.chunk + 1)


def heads_of(
    length: int, queries: int, dtype: torch.dtype, past: int = 0, width: int = HEAD_DIM, value_width: int = HEAD_DIM
) -> list[Tensor]:
    """Key, value and queries, as projections lay them out."""
    drawn = torch.Generator().manual_seed(length)
    shapes = [(2, length, KEY_HEADS, width), (2, length, KEY_HEADS, value_width)]
    shapes += [(2, length - past, HEADS, width)] * queries
    return [torch.randn(s, generator=drawn).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for s in shapes]


def by_kernels(heads: Sequence[Tensor], view: View, sinks: Tensor | None = None) -> Tensor:
    """What the device computes it by; on a GPU nothing else may have served."""
    key, value, *queries = heads
    if ON_GPU:
        from moelab.nn import flex_attention

        assert flex_attention.serves(queries[0], view, value.shape[-1])
    out = masked_attention(queries, key, value, view, sinks=sinks)
    if ON_GPU:
        assert not flex_attention._refused
    return out


def in_blocks(heads: Sequence[Tensor], view: View, sinks: Tensor | None = None) -> Tensor:
    key, value, *queries = heads
    return blocked_attention(queries, key, value, view, sinks=sinks)


def some_sinks() -> Tensor:
    return torch.linspace(-2.0, 3.0, HEADS, device=DEVICE).requires_grad_()


def all_of(heads: Sequence[Tensor], sinks: Tensor | None) -> Tensor:
    """Plain causal attention over all pairs, in float64."""
    key, value, query = (each.double() for each in heads)
    shared = HEADS // KEY_HEADS
    scores = query @ key.repeat_interleave(shared, 1).mT * query.shape[-1] ** -0.5
    hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(2, -1, scores.shape[2], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value.repeat_interleave(shared, 1)


def gradients(out: Tensor, heads: Sequence[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(out, heads, direction.to(out)))


def agree(mine: Tensor, other: Tensor, tolerance: float) -> None:
    mine, other = mine.detach(), other.detach()
    assert bool(mine.isfinite().all())
    scale = float(other.abs().max())
    difference = float((mine.float() - other.float()).abs().max())
    assert difference < tolerance * scale, f"{difference:g} beside {scale:g}"


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_what_blocks_give_and_their_gradients(case: str) -> None:
    view, queries = view_of(LENGTH, **CASES[case])
    heads = heads_of(LENGTH, queries, torch.float32)
    with full_precision():
        mine, other = by_kernels(heads, view), in_blocks(heads, view)
        agree(mine, other, 1e-4)
        for one, another in zip(gradients(mine, heads), gradients(other, heads), strict=True):
            agree(one, another, 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_sinks_join_the_softmax_of_kernels(case: str) -> None:
    """As blocks have it, in output and in every gradient, the sinks' among them."""
    view, queries = view_of(LENGTH, **CASES[case])
    heads, sinks = heads_of(LENGTH, queries, torch.float32), some_sinks()
    with full_precision():
        mine, other = by_kernels(heads, view, sinks), in_blocks(heads, view, sinks)
        agree(mine, other, 1e-4)
        leaves = [*heads, sinks]
        for one, another in zip(gradients(mine, leaves), gradients(other, leaves), strict=True):
            agree(one, another, 1e-3)


@pytest.mark.parametrize("case", ["documents", "window", "padding"])
@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
def test_kernels_take_keys_of_192_beside_values_of_128(case: str, sunk: bool) -> None:
    """DeepSeek-V2's and V3's widths, the first of which is no power of two; in bfloat16, as they are trained."""
    view, queries = view_of(LENGTH, **CASES[case])
    heads = heads_of(LENGTH, queries, torch.bfloat16, width=192, value_width=128)
    sinks = some_sinks() if sunk else None
    mine, other = by_kernels(heads, view, sinks), in_blocks(heads, view, sinks)
    assert mine.shape == (2, HEADS, LENGTH, 128)
    agree(mine, other, 0.02)
    leaves = heads if sinks is None else [*heads, sinks]
    for one, another in zip(gradients(mine, leaves), gradients(other, leaves), strict=True):
        agree(one, another, 0.03)


@pytest.mark.parametrize("widths", rehearsed([(192, 128), (64, 64), (64, 96)]), ids=str)
@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_attention_is_that_over_all_pairs(widths: tuple[int, int], sunk: bool, dtype: torch.dtype) -> None:
    """Whatever serves: torch's own kernel over widened heads, or beside sinks those of blocks."""
    heads = heads_of(LENGTH, 1, dtype, width=widths[0], value_width=widths[1])
    sinks = some_sinks() if sunk else None
    positions = torch.arange(LENGTH, device=DEVICE).expand(2, -1)
    inputs = AttentionInputs(Rope(HEAD_DIM, 1e4), positions, dtype, sinks=sinks)
    close = 1e-4 if dtype == torch.float32 else 0.02
    with full_precision():
        mine, other = FullAttention(0).on_turned(heads[2], heads[0], heads[1], inputs), all_of(heads, sinks)
        agree(mine, other, close)
        leaves = heads if sinks is None else [*heads, sinks]
        for one, another in zip(gradients(mine, leaves), gradients(other, leaves), strict=True):
            agree(one, another, 10 * close if dtype == torch.float32 else 0.03)


def test_a_cache_goes_on_by_kernels() -> None:
    """Without gradients, as text is read in parts."""
    view, queries = view_of(LENGTH, documents=True, past=300, chunk=150)
    heads = heads_of(LENGTH, queries, torch.float32, past=300)
    with torch.no_grad(), full_precision():
        agree(by_kernels(heads, view), in_blocks(heads, view), 1e-4)


def test_other_lengths_and_documents_are_served_in_bf16_without_a_wait() -> None:
    """The second length is compiled for any; a third one, and other documents, must find that ready."""
    for length in (640, 700):
        view, queries = view_of(length, documents=True)
        heads = heads_of(length, queries, torch.bfloat16)
        gradients(by_kernels(heads, view), heads)
    heads = heads_of(600, 1, torch.bfloat16)
    direction = torch.randn(heads[2].shape, generator=torch.Generator().manual_seed(1)).to(heads[2])
    borders = torch.tensor([[100, 300], [200, 500]], device=DEVICE)
    documents = (torch.arange(600, device=DEVICE) >= borders[..., None]).long().sum(1)
    positions = torch.arange(600, device=DEVICE).expand(2, -1)
    rope = Rope(HEAD_DIM, 1e4)
    with never_waiting():
        view = View.of(AttentionInputs(rope, positions, torch.bfloat16, documents=documents))
        mine = by_kernels(heads, view)
        found = torch.autograd.grad(mine, heads, direction)
    other = in_blocks(heads, view)
    agree(mine, other, 0.02)
    for one, another in zip(found, torch.autograd.grad(other, heads, direction), strict=True):
        agree(one, another, 0.02)
