"""Blocks give what all pairs give, however small they are cut, with weights kept or computed again."""

from __future__ import annotations

import pytest
import torch

from moelab import Registry, testing
from moelab.hookspecs import ATTENTIONS
from moelab.nn import blocked_attention as module
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
