"""Closed forms of the routing metrics: balanced, collapsed, padded, split into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moelab.moe.routing import LayerRecord, Routing
from moelab.training.router_statistics import RouterReport, RouterStatistics, rank_metrics

E, K = 8, 2


def record(expert: Tensor, scores: Tensor | None = None, layer_id: int = 3, **fields: Tensor) -> LayerRecord:
    weight = torch.full(expert.shape, 0.3) if scores is None else scores.gather(1, expert)
    routing = Routing.from_topk(expert, weight, E, scores=scores, **fields)
    return LayerRecord(layer_id, routing, routing.counts())


def balanced(tokens: int = 4 * E) -> Tensor:
    """Token t goes to experts 2t and 2t + 1 (mod E): every expert equally often."""
    first = (K * torch.arange(tokens)) % E
    return torch.stack([first, first + 1], dim=1)


def reduce(*records: LayerRecord) -> dict[str, float]:
    statistics = RouterStatistics()
    for one in records:
        statistics.add([one])
    return statistics.reduce().metrics


def test_uniform_router_has_full_entropy_and_no_violation() -> None:
    metrics = reduce(record(balanced(), torch.full((4 * E, E), 1 / E)))
    assert metrics["moe/layer_03/max_violation"] == pytest.approx(0)
    assert metrics["moe/layer_03/dead_fraction"] == 0
    assert metrics["moe/layer_03/load_entropy"] == pytest.approx(1)
    assert metrics["moe/layer_03/router_entropy"] == pytest.approx(math.log(E), rel=1e-6)  # fp32 scores
    assert metrics["moe/layer_03/top_k_mass"] == pytest.approx(K / E)


def test_collapsed_router_leaves_all_but_k_experts_dead() -> None:
    expert = torch.tensor([[0, 1]]).repeat(10, 1)
    scores = torch.zeros(10, E)
    scores[:, 0] = 1.0
    metrics = reduce(record(expert, scores))
    assert metrics["moe/layer_03/max_violation"] == pytest.approx(E / K - 1)
    assert metrics["moe/layer_03/dead_fraction"] == pytest.approx(1 - K / E)
    assert metrics["moe/layer_03/load_entropy"] == pytest.approx(math.log(K) / math.log(E))
    assert metrics["moe/layer_03/router_entropy"] == 0
    assert metrics["moe/layer_03/top_k_mass"] == pytest.approx(1)


def test_max_violation_is_that_of_the_papers_example() -> None:
    """Counts 6, 2, 2, 2: mean 3, so the fullest expert has twice its share and MaxVio is 1."""
    expert = torch.tensor([0] * 6 + [1] * 2 + [2] * 2 + [3] * 2).unsqueeze(1)
    routing = Routing.from_topk(expert, torch.ones(12, 1), 4)
    metrics = reduce(LayerRecord(0, routing, routing.counts()))
    assert metrics["moe/layer_00/max_violation"] == pytest.approx(1)


def test_padding_changes_nothing_even_when_it_is_not_a_number() -> None:
    expert, scores = balanced(), torch.rand(4 * E, E)
    plain = reduce(record(expert, scores))
    padded_scores = torch.cat([scores, torch.full((5, E), torch.nan)])
    padded_expert = torch.cat([expert, torch.zeros(5, K, dtype=torch.int64)])
    mask = torch.arange(4 * E + 5) < 4 * E
    assert reduce(record(padded_expert, padded_scores, token_mask=mask)) == pytest.approx(plain)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    scores = torch.rand(30, E)
    expert = scores.topk(K).indices
    whole = reduce(record(expert, scores))
    pieces = reduce(*(record(expert[part], scores[part]) for part in (slice(0, 7), slice(7, 8), slice(8, 30))))
    assert pieces == pytest.approx(whole)


def test_scores_that_do_not_sum_to_one_are_normalised() -> None:
    scores = torch.rand(16, E)
    expert = scores.topk(K).indices
    assert reduce(record(expert, scores * 5)) == pytest.approx(reduce(record(expert, scores)))


def test_without_scores_the_mass_is_the_weights_and_there_is_no_entropy() -> None:
    metrics = reduce(record(balanced()))
    assert metrics["moe/layer_03/top_k_mass"] == pytest.approx(K * 0.3)
    assert "moe/layer_03/router_entropy" not in metrics


def test_logits_stand_in_for_missing_scores() -> None:
    logits = torch.randn(16, E)
    expert = logits.topk(K).indices
    from_logits = reduce(record(expert, logits=logits))
    assert from_logits == pytest.approx(reduce(record(expert, logits.softmax(-1))))


def test_dropped_assignments_are_counted_against_those_wanted() -> None:
    token = torch.arange(6)
    routing = Routing.from_assignments(
        token, token, torch.ones(6), 8, E, dropped=torch.tensor(2)
    )  # fmt: skip
    metrics = reduce(LayerRecord(0, routing, routing.counts()))
    assert metrics["moe/layer_00/dropped_fraction"] == pytest.approx(2 / 8)
    assert metrics["moe/layer_00/top_k_mass"] == pytest.approx(6 / 8)
    assert metrics["moe/layer_00/experts_per_token"] == pytest.approx(6 / 8)
    assert "moe/layer_03/experts_per_token" not in reduce(record(balanced()))  # always K: nothing to tell


def test_mean_is_over_the_layers_and_loads_sum_to_one() -> None:
    statistics = RouterStatistics()
    collapsed = torch.tensor([[0, 1]]).repeat(4 * E, 1)
    statistics.add([record(balanced(), layer_id=1), record(collapsed, layer_id=11)])
    report = statistics.reduce()
    metrics, loads = report.metrics, report.loads
    assert metrics["moe/mean/max_violation"] == pytest.approx((0 + E / K - 1) / 2)
    assert set(loads) == {1, 11}
    assert loads[11] == [0.5, 0.5] + [0] * (E - 2)
    assert sum(loads[1]) == pytest.approx(1)
    assert "moe/layer_11/max_violation" in metrics


def test_reducing_starts_over_and_no_tokens_give_no_metrics() -> None:
    statistics = RouterStatistics()
    statistics.add([record(balanced())])
    statistics.reduce()
    assert statistics.reduce() == RouterReport({}, {})
    empty = record(torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, E))
    statistics.add([empty])
    assert statistics.reduce() == RouterReport({}, {})


def test_ranks_are_summed_by_the_given_function() -> None:
    """Two ranks with the same records: shares and means are those of one."""
    statistics = RouterStatistics()
    scores = torch.rand(16, E)
    statistics.add([record(scores.topk(K).indices, scores)])
    assert statistics.reduce(lambda vector: vector * 2).metrics == pytest.approx(
        reduce(record(scores.topk(K).indices, scores))
    )


def test_adding_and_reducing_transfer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: transfers.append(self.shape) or original(self))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("a synchronisation"))
    statistics = RouterStatistics()
    for layer_id in (0, 1, 0, 1):
        statistics.add([record(balanced(), torch.rand(4 * E, E), layer_id)])
    assert not transfers
    statistics.reduce()
    assert len(transfers) == 1


def test_a_router_that_serves_fewer_than_it_chose_tells_how_many() -> None:
    """Placeholders keep the shape of K experts a token; what is served is less."""
    expert = balanced()
    routing = Routing.from_topk(expert, torch.ones(expert.shape), E).serve(torch.arange(expert.numel()) % 4 < 3)
    metrics = reduce(LayerRecord(3, routing, routing.counts()))
    assert metrics["moe/layer_03/experts_per_token"] == 1.5
    plain = Routing.from_topk(expert, torch.ones(expert.shape), E)
    assert "moe/layer_03/experts_per_token" not in reduce(LayerRecord(3, plain, plain.counts()))


def test_a_layer_that_no_token_reached_says_so_and_has_no_load() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    routing = Routing.from_assignments(nothing, nothing, torch.zeros(0), 8, E)
    assert reduce(LayerRecord(0, routing, routing.counts())) == {
        "moe/layer_00/experts_per_token": 0.0, "moe/mean/experts_per_token": 0.0,
    }  # fmt: skip
    refused = Routing.from_assignments(nothing, nothing, torch.zeros(0), 8, E, dropped=torch.tensor(16))
    assert reduce(LayerRecord(0, refused, refused.counts()))["moe/layer_00/dropped_fraction"] == 1.0


def test_processes_that_share_out_experts_are_as_uneven_as_the_runs_of_experts_that_they_own() -> None:
    loads = {0: [0.1, 0.1, 0.4, 0.4], 3: [0.25, 0.25, 0.25, 0.25]}
    assert rank_metrics(loads, 1) == {}
    assert rank_metrics(loads, 2) == pytest.approx(
        {"moe/layer_00/rank_violation": 0.6, "moe/layer_03/rank_violation": 0.0, "moe/mean/rank_violation": 0.3}
    )
    assert rank_metrics(loads, 4)["moe/layer_00/rank_violation"] == pytest.approx(0.6)  # each owns one: MaxVio
