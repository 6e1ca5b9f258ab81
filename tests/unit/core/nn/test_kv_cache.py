"""The cache: what is appended stays, memory is made ahead, rows can be taken."""

from __future__ import annotations

import torch

from moelab.nn.kv_cache import KVCache


def _pieces(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 3, 1, 4, generator=torch.Generator().manual_seed(0)).unbind(0))


def test_what_is_appended_is_held_in_order():
    cache, pieces = KVCache(1, room=3), _pieces(20)
    for number, piece in enumerate(pieces, 1):
        keys, values = cache.append(0, piece, -piece)
        assert torch.equal(keys, torch.cat(pieces[:number], 2))
        assert torch.equal(values, -keys)
        assert cache.length == number


def test_memory_is_made_a_few_times_not_at_each_token():
    cache, made = KVCache(1, room=4), set()
    for piece in _pieces(64):
        made.add(cache.append(0, piece, piece)[0].data_ptr())
    assert len(made) == 5  # for 4, 8, 16, 32 and 64


def test_rows_are_left_out_and_repeated():
    cache = KVCache(1)
    piece = torch.randn(3, 2, 5, 4)
    cache.append(0, piece, piece)
    cache.extend_mask(torch.ones(3, 5, dtype=torch.bool))
    cache.take_rows(torch.tensor([2, 0, 0, 2]))
    assert torch.equal(cache.held(0)[0], piece[[2, 0, 0, 2]])
    assert cache.mask is not None
    assert cache.mask.shape == (4, 5)


def test_a_backward_pass_through_a_cache_sees_what_was_there():
    cache = KVCache(1)
    first, second = (torch.ones(1, 1, 1, 1, requires_grad=True) for _ in range(2))
    keys, _ = cache.append(0, first, first)
    loss = (keys * keys).sum()
    keys, _ = cache.append(0, second * 3, second)
    (loss + (keys * keys).sum()).backward()
    assert first.grad is not None and second.grad is not None
    assert (first.grad.item(), second.grad.item()) == (4.0, 18.0)


def test_what_is_taken_is_forgotten_and_the_length_stays():
    cache = KVCache(2)
    piece = _pieces(1)[0]
    for layer in range(2):
        cache.append(layer, piece, -piece)
    keys, values = cache.taken(0)
    assert torch.equal(keys, piece) and torch.equal(values, -piece)
    assert cache.length == piece.shape[2]
    assert torch.equal(cache.held(1)[0], piece)
    cache.take_rows(torch.zeros(1, dtype=torch.int64))  # of what it still has
    assert len(cache.held(1)[0]) == 1
