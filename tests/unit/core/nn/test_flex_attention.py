"""FlexAttention gives what blocks give: its masks and its merge, by torch's uncompiled function in place of kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter

from moelab import Registry, testing
from moelab.hookspecs import ATTENTIONS
from moelab.nn import flex_attention, masked_attention
from moelab.nn.attention_inputs import AttentionInputs
from moelab.nn.blocked_attention import View, blocked_attention
from moelab.nn.flex_attention import BLOCK, Span, block_lists, flexed_attention, merged, spans_of
from moelab.nn.rope import Rope
from moelab.testing import attentions

CPU = torch.device("cpu")
REGISTRY = Registry(entry_points=False)


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor does what one test found out about this machine stay for the next."""
    monkeypatch.setattr(flex_attention, "_compiled", lambda: merged)
    monkeypatch.setattr(flex_attention, "_refused", set())
    found_out = flex_attention._compiler
    found_out.cache_clear()
    yield
    found_out.cache_clear()


def documents_of(batch: int, length: int, mean: int, seed: int = 0) -> Tensor:
    """[B, L], documents of `mean` positions on average."""
    drawn = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return (drawn < 1 / mean).long().cumsum(1)


def view_of(
    seq: int, past: int = 0, mean: int | None = None, padding: str | None = None, seed: int = 0, **ends: int | None
) -> View:
    """Of two sequences; documents of `mean` positions, padding before the second sequence or in holes."""
    length = past + seq
    documents = None if mean is None else documents_of(2, length, mean, seed)
    real = None
    if padding == "before":
        real = torch.arange(length) >= torch.tensor([[0], [37]])
    elif padding == "holes":
        real = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.2
    positions = torch.arange(past, length).expand(2, -1)
    rope = Rope(16, 1e4)
    return View.of(
        AttentionInputs(rope, positions, torch.float32, past=past, documents=documents, padding=real), **ends
    )


def heads_of(view: View, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Key, value and queries: 4 query heads in 2 groups of 16."""
    drawn, length = torch.Generator().manual_seed(5), view.past + view.seq
    count = 1 if view.chunk is None else min(3, (length - 1) // view.chunk + 1)
    shapes = [(2, 2, length, 16)] * 2 + [(2, 4, view.seq, 16)] * count
    return [torch.randn(shape, generator=drawn, dtype=dtype) for shape in shapes]


def seen(view: View) -> Tensor:
    """[B, S, L] bool, by `View`'s own definition of what a query sees."""
    length = view.past + view.seq
    query, key = torch.arange(view.past, length)[:, None], torch.arange(length)
    allowed = (key <= query).expand(view.batch, -1, -1)
    if view.window is not None:
        allowed = allowed & (key > query - view.window)
    if view.segments is not None:
        allowed = allowed & view.visible(slice(None), slice(0, view.seq), slice(0, length))
    return allowed


def shown(span: Span, length: int) -> Tensor:
    """[B, S, L] bool: what a span says."""
    key = torch.arange(length)
    inside = (key >= span.first[..., None]) & (key <= span.last[..., None])
    if span.numbers is None:
        return inside
    return inside & (span.numbers[0][..., None] == span.numbers[1][:, None])


def dense(query: Tensor, key: Tensor, value: Tensor, span: Span, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """In place of `attend`, with gradients: a row without keys gives 0, and -inf for its LSE."""
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    mask = shown(span, key.shape[2])[:, None]
    some = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask & some, float("-inf")).masked_fill(~some, 0.0)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1) @ value * some, lse.masked_fill(~some[..., 0], float("-inf"))


@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("mean", [None, 40])
@pytest.mark.parametrize("padding", [None, "before", "holes"])
def test_masks_give_what_blocks_give(
    chunk: int | None, window: int | None, mean: int | None, padding: str | None
) -> None:
    for seq, past in ((300, 0), (150, 77)):
        view = view_of(seq, past, mean, padding, window=window, chunk=chunk)
        key, value, *queries = heads_of(view)
        found = flexed_attention(queries, key, value, view)
        assert found is not None
        torch.testing.assert_close(found, blocked_attention(queries, key, value, view), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize("mean", [None, 40])
@pytest.mark.parametrize("padding", [None, "holes"])
def test_gradients_pass_through_the_merge(chunk: int | None, mean: int | None, padding: str | None) -> None:
    view = view_of(150, 30, mean, padding, window=120, chunk=chunk)
    heads = [each.requires_grad_() for each in heads_of(view, torch.float64)]
    key, value, *queries = heads
    found = merged(tuple(queries), key, value, spans_of(view, CPU), by=dense)
    right = blocked_attention(queries, key, value, view)
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    for mine, other in zip(
        torch.autograd.grad(found, heads, direction), torch.autograd.grad(right, heads, direction), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def expanded(count: Tensor, indices: Tensor, columns: int) -> Tensor:
    """[B, rows, columns]: how often each block is listed."""
    assert count.dtype == indices.dtype == torch.int32
    assert count.is_contiguous()
    assert indices.is_contiguous()
    assert bool(((indices >= 0) & (indices < columns)).all())
    listed = torch.arange(columns) < count[:, 0, :, None]
    return torch.zeros(listed.shape, dtype=torch.long).scatter_add_(-1, indices[:, 0].long(), listed.long())


@pytest.mark.parametrize("seed", range(20))
def test_each_pair_that_is_seen_lies_in_one_listed_block_and_whole_blocks_are_seen_whole(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=drawn))]

    seq, past = pick(48, 384, 700, 1000), pick(0, 0, 200)
    window, chunk = pick(None, 5, 300), pick(None, 60, 300)
    padding, mean = pick(None, "before", "holes"), pick(None, 20, 150, 400)
    view = view_of(seq, past, mean, padding, seed, window=window, chunk=chunk)
    length, together = past + seq, torch.zeros(2, seq, past + seq, dtype=torch.long)
    for span in spans_of(view, CPU):
        pairs = shown(span, length)
        together += pairs
        rows, columns = -(-seq // BLOCK), -(-length // BLOCK)
        partly, whole = expanded(*span.blocks[:2], columns), expanded(*span.blocks[2:4], columns)
        assert (partly + whole).max() <= 1
        assert torch.equal(partly, expanded(*span.blocks[4:6], rows).mT)
        assert torch.equal(whole, expanded(*span.blocks[6:], rows).mT)
        beyond = (0, columns * BLOCK - length, 0, rows * BLOCK - seq)
        blocks = torch.nn.functional.pad(pairs, beyond).unflatten(2, (columns, BLOCK)).unflatten(1, (rows, BLOCK))
        assert bool((blocks.any(-1).any(2) <= (partly + whole).bool()).all())
        assert bool((blocks.all(-1).all(2) >= whole.bool()).all())
    assert torch.equal(together, seen(view).long())


def test_blocks_that_all_queries_see_are_known_to_be_whole_and_others_are_left_out() -> None:
    """One text of 8 blocks: row r meets r + 1, r of them whole. Documents of 2 blocks: no row meets more than 2.

    A window of 300: its border crosses two blocks of a row's keys, and the block after them is whole.
    """
    index = torch.arange(8 * BLOCK)[None]
    partly, _, whole, *_ = block_lists(torch.zeros_like(index), index, 8 * BLOCK)
    assert partly.flatten().tolist() == [1] * 8
    assert whole.flatten().tolist() == list(range(8))
    partly, _, whole, *_ = block_lists(index // (2 * BLOCK) * (2 * BLOCK), index, 8 * BLOCK)
    assert (partly + whole).flatten().tolist() == [1, 2] * 4
    partly, _, whole, *_ = block_lists((index - 299).clamp(min=0), index, 8 * BLOCK)
    assert partly.flatten().tolist() == [1, 1, 2, 3, 3, 3, 3, 3]
    assert whole.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("sliding_window", {"window": 11}),
        ("dual_chunk", {"preset": None, "chunk": 7, "local": 3, "max_position": 12}),
    ],
)
def test_attentions_are_what_they_are_by_definition(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(i: Tensor, j: Tensor) -> tuple[Tensor, ...]:
        if name != "dual_chunk":
            return i - j, (j <= i) & (i - j < options.get("window", 1 << 30)), torch.ones(())
        back, inside = i // 7 - j // 7, i % 7
        place = torch.where(back == 0, inside, torch.where((back == 1) & (inside < 3), 7 + inside, 12))
        return place - j % 7, j <= i, torch.ones(())

    calls = []

    def flexed(
        queries: Any, key: Tensor, value: Tensor, view: View, look: object, sinks: Tensor | None
    ) -> Tensor | None:
        calls.append(view)
        return flexed_attention(queries, key, value, view, sinks)

    monkeypatch.setattr(flex_attention, "_compiled", lambda: partial(merged, by=dense))
    monkeypatch.setattr(masked_attention, "blocked_attention", flexed)
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)[name], options, definition=distance)
    attentions.equals_its_definition(case)
    attentions.documents_are_apart(case)
    attentions.padding_changes_nothing(case)
    attentions.a_cache_continues_the_text(case)
    assert calls


def test_other_documents_need_no_other_compilation_and_many_lengths_few() -> None:
    counter = CompileCounter()
    compiled = torch.compile(merged, fullgraph=True, backend=counter)

    def run(seq: int, seed: int) -> None:
        view = view_of(seq, mean=40, seed=seed)
        key, value, *queries = heads_of(view)
        found = compiled(tuple(queries), key, value, spans_of(view, CPU))
        torch.testing.assert_close(found, blocked_attention(queries, key, value, view), rtol=1e-4, atol=1e-5)

    torch._dynamo.reset()
    for seed in range(3):
        run(300, seed)
    assert counter.frame_count == 1
    for seq in (280, 290, 400, 410, 520, 530):
        run(seq, 0)
    assert counter.frame_count <= 3  # one for any length, once more for any number of blocks
    torch._dynamo.reset()


def test_what_cannot_be_compiled_runs_in_blocks_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(*_: Any) -> Tensor:
        raise TorchDynamoException("no such kernel\nand more")

    monkeypatch.setattr(flex_attention, "_compiled", lambda: refusing)
    monkeypatch.setattr(flex_attention, "_compiler", lambda: True)
    view = view_of(40, mean=9)
    key, value, query = heads_of(view)
    assert flex_attention.serves(query, view)
    with caplog.at_level(logging.WARNING, "moelab"):
        assert flexed_attention([query], key, value, view) is None
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ["no such kernel"]
    assert not flex_attention.serves(query, view)
    assert flex_attention.serves(query.half(), view)


def test_without_triton_or_a_c_compiler_blocks_serve_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = view_of(40, mean=9)
    _, _, query = heads_of(view)
    for missing, found, which in (("triton", None, "/bin/gcc"), ("a C compiler", "triton", None)):
        flex_attention._compiler.cache_clear()
        caplog.clear()
        monkeypatch.setattr(flex_attention, "find_spec", lambda _, found=found: found)
        monkeypatch.setattr(flex_attention.shutil, "which", lambda _, which=which: which)
        with caplog.at_level(logging.WARNING, "moelab"):
            assert not flex_attention.serves(query, view)
            assert not flex_attention.serves(query, view)
        assert len(caplog.records) == 1
        assert missing in caplog.text


def test_small_heads_wide_numbers_and_a_few_new_tokens_stay_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_compiler", lambda: True)
    view = view_of(40, mean=9)
    query = heads_of(view)[2]
    assert flex_attention.serves(query, view)
    assert not flex_attention.serves(query[..., :8], view)
    assert not flex_attention.serves(query.double(), view)
    assert not flex_attention.serves(query[:, :, :1], view_of(1, 39, mean=9))


def test_a_cpu_never_asks_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "serves", lambda *_: pytest.fail("asked"))
    view = view_of(40, mean=9)
    key, value, query = heads_of(view)
    found = masked_attention.masked_attention([query], key, value, view)
    assert torch.equal(found, blocked_attention([query], key, value, view))
