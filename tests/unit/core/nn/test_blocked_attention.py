"""Blocks give what all pairs give, however small they are cut, with weights kept or computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelab import Registry, testing
from moelab.hookspecs import ATTENTIONS
from moelab.nn import blocked_attention as module
from moelab.nn import fused_parts
from moelab.testing import attentions

REGISTRY = Registry(entry_points=False)
CASES = {
    "full": ({}, lambda i, j: (i - j, j <= i, torch.ones(()))),
    "sliding_window": ({"window": 11}, lambda i, j: (i - j, i - j < 11, torch.ones(()))),
    "dual_chunk": ({"preset": None, "chunk": 7, "local": 3, "max_position": 12}, None),
}


def distance(i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of Dual Chunk Attention with chunks of 7, 3 of them local, and 12 the largest position."""
    back, inside = i // 7 - j // 7, i % 7
    place = torch.where(back == 0, inside, torch.where((back == 1) & (inside < 3), 7 + inside, 12))
    return place - j % 7, j <= i, torch.ones(())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("rows", "together", "keep"), [(8, 1, 0), (14, 1 << 12, 300), (8, 1 << 19, 1 << 22)])
def test_small_blocks_give_what_all_pairs_give(
    name: str, rows: int, together: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("BLOCK_ROWS", rows), ("LEAST_ROWS", 3), ("BATCH_ELEMENTS", together), ("KEEP_ELEMENTS", keep)):
        monkeypatch.setattr(module, key, value)
    options, definition = CASES[name]
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)[name], options, definition=definition or distance)
    attentions.equals_its_definition(case)
    attentions.documents_are_apart(case)
    attentions.padding_changes_nothing(case)
    attentions.a_cache_continues_the_text(case)


@pytest.mark.parametrize(("chunk", "local"), [(7, 3), (16, 16), (20, 1)])
def test_chunks_by_the_kernel_give_what_all_pairs_give(chunk: int, local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients, and a text that a cache continues from within a chunk; documents still go in blocks."""
    calls: list[tuple[int, int]] = []
    kernel = fused_parts.chunked_attention

    def counted(queries: list[torch.Tensor], key: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append((queries[0].shape[2], key.shape[2]))
        return kernel(queries, key, *rest)

    monkeypatch.setattr(module, "chunked_attention", counted)
    monkeypatch.setattr(fused_parts, "LEAST_QUERIES", 2)
    monkeypatch.setattr(module, "KEEP_ELEMENTS", 0)

    def definition(i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, ...]:
        back, inside = i // chunk - j // chunk, i % chunk
        place = torch.where(back == 0, inside, torch.where((back == 1) & (inside < local), chunk + inside, most))
        return place - j % chunk, j <= i, torch.ones(())

    most = chunk + local
    options = {"preset": None, "chunk": chunk, "local": local, "max_position": most}
    case = testing.AttentionCase(REGISTRY.components(ATTENTIONS)["dual_chunk"], options, definition=definition)
    attentions.equals_its_definition(case)
    whole = len(calls)
    assert whole > 0
    attentions.its_gradients_are_those_of_its_output(case)
    attentions.what_follows_changes_nothing(case)
    attentions.a_cache_continues_the_text(case)
    assert any(keys > queries > 1 for queries, keys in calls), "a block of a text that goes on"
    before, heads = len(calls), case.heads()
    case.run(heads, documents=(torch.arange(heads[0].shape[2]) // 20)[None])
    assert len(calls) == before


def test_short_texts_in_training_keep_their_weights_in_blocks() -> None:
    view = module.View(1, 0, 512, chunk=128)
    query = torch.zeros(1, 4, 512, 8)
    assert view.fuses(query, training=False)
    assert not view.fuses(query, training=True)
    assert module.View(1, 0, 8192, chunk=128).fuses(torch.zeros(1, 4, 8192, 1), training=True)
    assert not module.View(1, 8192, 1, chunk=128).fuses(torch.zeros(1, 4, 1, 8), training=False), "a token to decode"


def test_what_no_query_of_a_block_sees_is_not_computed() -> None:
    """Neither other documents nor keys outside the window: the work is that of what is seen."""
    documents = torch.arange(64).repeat_interleave(64)[None]
    apart = module.View(1, 0, 4096, segments=documents, starts=(torch.arange(4096) // 64 * 64)[None])
    near = module.View(1, 0, 4096, window=100)
    for view, most in ((apart, 64), (near, 100)):
        for block in view.blocks(1, 1):
            rows = block.rows.stop - block.rows.start
            assert block.keys.stop - block.keys.start < most + rows
    assert sum(b.rows.stop - b.rows.start for b in near.blocks(1, 1)) == 4096
