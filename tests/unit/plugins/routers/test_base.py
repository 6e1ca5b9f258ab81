"""BASE's assignment: balanced, near the optimum that a search finds, and the same for any padding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch

from moelab import ConfigError, MoEContext, Registry
from moelab.hookspecs import ROUTERS
from moelab.moe.waiting import as_on_an_accelerator
from moelab.testing.tensors import fill_parameters, make_info
from moelab_plugins.routers.base import balanced_assignment

REGISTRY = Registry(entry_points=False)


def optimum(value: np.ndarray, places: int) -> float:
    """The largest total of one expert a token, with so many places each: every way, by what is left."""

    @cache
    def best(token: int, left: tuple[int, ...]) -> float:
        if token == len(value):
            return 0.0
        ways = [e for e in range(len(left)) if left[e]]
        return max(value[token, e] + best(token + 1, (*left[:e], left[e] - 1, *left[e + 1 :])) for e in ways)

    return best(0, (places,) * value.shape[1])


@pytest.mark.parametrize(("tokens", "experts"), [(12, 3), (10, 4), (16, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_auction_is_near_the_optimum_and_balanced(tokens: int, experts: int, seed: int) -> None:
    value = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) + torch.arange(experts)
    places = -(-tokens // experts)
    found = balanced_assignment(value, torch.ones(tokens, dtype=torch.bool), 400, 0.01)
    assert torch.bincount(found, minlength=experts).max() <= places
    total = value.gather(1, found[:, None]).double().sum().item()
    assert optimum(value.double().numpy(), places) - total <= tokens * 0.01 + 1e-5


def plain_auction(value: np.ndarray, rounds: int, least_bid: float) -> list[int]:
    """Bertsekas' auction, bidder by bidder, all of a round at the same prices; -1: without an expert."""
    tokens, experts = value.shape
    places, price = -(-tokens // experts), np.zeros(experts, np.float32)
    held: list[list[tuple[np.float32, int]]] = [[] for _ in range(experts)]
    for _ in range(rounds):
        sitting = {token for bids in held for _, token in bids}
        for token in sorted(set(range(tokens)) - sitting):
            gain = value[token] - price
            best, second = np.argsort(-gain, kind="stable")[:2]
            held[best].append((price[best] + gain[best] - gain[second] + np.float32(least_bid), token))
        for expert, bids in enumerate(held):
            bids.sort(key=lambda one: (-one[0], one[1]))
            del bids[places:]
            if len(bids) == places:
                price[expert] = bids[-1][0]
    found = [-1] * tokens
    for expert, bids in enumerate(held):
        for _, token in bids:
            found[token] = expert
    return found


@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (50, 8), (40, 2)])
@pytest.mark.parametrize("rounds", [1, 7, 600])
@pytest.mark.parametrize("world", [nullcontext, as_on_an_accelerator])
def test_who_has_a_place_is_who_has_it_in_the_plain_auction(
    tokens: int, experts: int, rounds: int, world: Callable[[], AbstractContextManager[None]]
) -> None:
    """Whether those who sit are looked at again or not, and however many rounds are left when nobody bids."""
    value = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)) + torch.arange(experts) / 4
    with world():
        found = balanced_assignment(value, torch.ones(tokens, dtype=torch.bool), rounds, 0.05).tolist()
    plain = plain_auction(value.numpy(), rounds, 0.05)
    assert all(mine == theirs for mine, theirs in zip(found, plain, strict=True) if theirs >= 0)
    assert rounds < 600 or -1 not in plain


def test_who_is_outbid_in_the_last_round_takes_a_place_that_is_left() -> None:
    """One round: all want the same expert, which keeps its highest bids; the others fill up, in order."""
    value = torch.zeros(8, 4)
    value[:, 2] = torch.tensor([1.0, 8, 2, 3, 4, 5, 6, 7])
    found = balanced_assignment(value, torch.ones(8, dtype=torch.bool), 1, 0.01)
    assert found.tolist() == [0, 2, 0, 1, 1, 3, 3, 2]


def test_padding_takes_no_place() -> None:
    value = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(12) < 9
    found = balanced_assignment(value, valid, 400, 0.01)
    assert torch.bincount(found[:9], minlength=3).tolist() == [3, 3, 3]
    assert torch.equal(found[:9], balanced_assignment(value[:9], valid[:9], 400, 0.01))


def test_training_is_balanced_and_evaluation_takes_the_best() -> None:
    context = MoEContext(16, 8, 1, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)
    router = REGISTRY.build(ROUTERS, {"name": "base"}, context, "router")
    fill_parameters(router, 1)  # type: ignore[arg-type]
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    routing = router(x, make_info(2, 32, 64, training=True))
    assert routing.counts().tolist() == [8] * 8
    assert routing.scores is not None
    torch.testing.assert_close(routing.weight, routing.scores[routing.token, routing.expert])
    free = router(x, make_info(2, 32, 64, training=False))
    assert free.scores is not None
    assert torch.equal(free.expert, free.scores.argmax(1))
    assert free.counts().max() > 8


def test_two_experts_a_token_are_refused() -> None:
    context = MoEContext(16, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)
    with pytest.raises(ConfigError, match="takes one expert a token"):
        REGISTRY.build(ROUTERS, {"name": "base"}, context, "router")
