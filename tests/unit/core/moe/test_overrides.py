"""Other routes: what is removed is gone, what is swapped costs the same, and nothing depends on the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.overrides import (
    ByLayer,
    NextBest,
    Remove,
    RemoveAll,
    RemoveAtRandom,
    Sampled,
    hashed_uniform,
)
from moelab.moe.routing import Routing, TokenInfo

T, E, K = 64, 8, 3


def _info(tokens: int = T) -> TokenInfo:
    ids = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return TokenInfo(ids, zeros, zeros, torch.arange(tokens), zeros)


def _routing(*, holes: bool = False) -> Routing:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weight, expert = scores.topk(K)
    routing = Routing.from_topk(expert, weight, E, scores=scores)
    if not holes:
        return routing
    return routing.serve(torch.rand(T * K, generator=torch.Generator().manual_seed(2)) < 0.7)


def _apply(override: object, routing: Routing) -> Routing:
    return override(0, routing, torch.zeros(T, 4), _info())  # type: ignore[operator]


def _dense(routing: Routing) -> Tensor:
    """[T, E] weights."""
    return torch.zeros(T, E).index_put_((routing.token, routing.expert), routing.weight, accumulate=True)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_what_is_removed_is_gone_and_the_rest_keeps_its_sum_or_its_weights(holes: bool, renormalise: bool):
    routing = _routing(holes=holes)
    before, after = _dense(routing), _dense(_apply(Remove({1, 5}, renormalise), routing))
    kept = before.clone()
    kept[:, [1, 5]] = 0
    if renormalise:
        has = kept.sum(-1) > 0
        kept[has] *= (before.sum(-1) / kept.sum(-1))[has, None]
    torch.testing.assert_close(after, kept)
    untouched = (before[:, [1, 5]] == 0).all(-1)
    assert torch.equal(after[untouched], before[untouched]), "bits of tokens that lost nothing"


def test_a_layer_without_its_routes_serves_nothing():
    assert _apply(RemoveAll(), _routing(holes=True)).counts().sum() == 0


def test_as_many_are_removed_by_chance_as_were_asked_for():
    routing = _routing()
    assert torch.equal(_dense(_apply(RemoveAtRandom(0.0), routing)), _dense(routing))
    assert _apply(RemoveAtRandom(1.0), routing).counts().sum() == 0
    left = sum(int(_apply(RemoveAtRandom(0.25, seed), routing).counts().sum()) for seed in range(40))
    assert left / (40 * T * K) == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / (40 * T * K)) ** 0.5)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("replaced", [1, 2, None])
def test_the_next_best_stand_where_the_last_stood(holes: bool, replaced: int | None):
    routing = _routing(holes=holes)
    assert routing.scores is not None
    other = _apply(NextBest(replaced), routing)
    served = torch.ones(T, K, dtype=torch.bool) if routing.served is None else routing.served.view(T, K)
    expert, was = other.expert.view(T, K), routing.expert.view(T, K)
    for token in range(T):
        mine = was[token][served[token]].tolist()
        order = routing.scores[token].argsort(descending=True).tolist()
        unused = [one for one in order if one not in mine]
        stay = max(0, len(mine) - (len(mine) if replaced is None else replaced))
        assert expert[token][served[token]].tolist() == mine[:stay] + unused[: len(mine) - stay]
    assert torch.equal(other.weight, routing.weight)


def test_where_all_experts_are_chosen_there_is_no_next_best():
    scores = torch.rand(T, E)
    weight, expert = scores.topk(E)
    routing = Routing.from_topk(expert, weight, E, scores=scores)
    assert torch.equal(_apply(NextBest(), routing).expert, routing.expert)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_sampled_routes_have_as_many_distinct_experts_and_the_same_weights(holes: bool, temperature: float | None):
    routing = _routing(holes=holes)
    other = _apply(Sampled(3, temperature), routing)
    assert torch.equal(other.weight, routing.weight)
    assert other.counts().sum() == routing.counts().sum()
    served = torch.ones(T, K, dtype=torch.bool) if routing.served is None else routing.served.view(T, K)
    for token in range(T):
        mine = other.expert.view(T, K)[token][served[token]]
        assert len(set(mine.tolist())) == len(mine)
        if temperature is not None:
            assert routing.scores is not None
            assert routing.scores[token][mine].tolist() == sorted(routing.scores[token][mine].tolist(), reverse=True)


def test_first_draws_follow_the_scores():
    """With one slot, Gumbel noise on log scores draws in proportion to the scores."""
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(T, 1)
    routing = Routing.from_topk(torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1), 4, scores=scores)
    counts = sum(_apply(Sampled(seed, 1.0), routing).counts() for seed in range(100)).double()  # type: ignore[union-attr]
    error = (scores[0].double() * (1 - scores[0].double()) / (100 * T)) ** 0.5
    assert (((counts / (100 * T)) - scores[0].double()).abs() < 5 * error).all()


def test_draws_depend_on_the_token_and_not_on_the_batch():
    info = _info()
    whole = hashed_uniform(info, E, 7)
    half = replace(info, token_id=info.token_id[:32], document_id=info.document_id[:32], position=info.position[:32])
    assert torch.equal(hashed_uniform(half, E, 7), whole[:32])
    assert not torch.equal(hashed_uniform(info, E, 8), whole)
    assert whole.min() > 0
    assert whole.max() < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / whole.numel()) ** 0.5)


def test_only_named_layers_are_changed():
    routing = _routing()
    override = ByLayer({1: RemoveAll()})
    assert override(0, routing, torch.zeros(T, 4), _info()) is routing
    assert override(1, routing, torch.zeros(T, 4), _info()).counts().sum() == 0


def test_routers_without_scores_or_slots_say_what_is_missing():
    routing = replace(_routing(), scores=None)
    with pytest.raises(ConfigError, match="layer 0: its router gives no scores"):
        _apply(NextBest(), routing)
    assert _apply(Sampled(), routing).counts().sum() == T * K
    with pytest.raises(ConfigError, match="no slots"):
        _apply(Sampled(), replace(routing, top_k=None))
