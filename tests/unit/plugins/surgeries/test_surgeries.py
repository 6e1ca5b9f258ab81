"""What each surgery is for: who is copied, who goes, who is merged with whom, and what is refused before any work."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moelab import LayerPlan
from moelab.hookspecs import SURGERIES
from moelab.moe.layout import ExpertLayout
from moelab.moe.surgery import ExpertRows
from moelab.registry import Registry
from moelab.testing import SurgeryCase
from moelab.testing.surgeries import refuses
from moelab_plugins.surgeries import _grouping as grouping

KNOWN = Registry(entry_points=False).components(SURGERIES)


def _case(name: str, **options: Any) -> SurgeryCase:
    return SurgeryCase(KNOWN[name], options)


def _plan(case: SurgeryCase, **scores: list[float]) -> LayerPlan:
    """With these scores in place of the case's."""
    measured = {key: np.array(value, np.float64) for key, value in scores.items()}
    case.scores = replace(case.scores, **measured)
    return case.plan()


def _sources(plan: LayerPlan) -> list[int]:
    return [expert.sources[0] for expert in plan.experts]


def test_growing_evenly_copies_every_expert_and_puts_copies_beside_it() -> None:
    plan = _plan(_case("grow", num_experts=20))
    assert _sources(plan) == sorted([*range(8), *range(8), *range(4)])
    assert [expert.copies for expert in plan.experts] == [3] * 12 + [2] * 8
    assert [expert.weight for expert in plan.experts] == [1 / 3] * 12 + [1 / 2] * 8
    assert plan.num_experts_per_tok == 2


def test_growing_by_a_score_copies_the_best_first_and_each_so_often_at_most() -> None:
    plan = _plan(_case("grow", num_experts=12, by="load", max_copies=3, noise=0.5), load=[1, 9, 2, 8, 0, 0, 0, 0])
    assert Counter(_sources(plan)) == {1: 4, 3: 2, **dict.fromkeys((0, 2, 4, 5, 6, 7), 1)}
    assert [expert.noise for expert in plan.experts if expert.sources == (1,)] == [0, 0.5, 0.5, 0.5]
    case = _case("grow", num_experts=9, by="weight_norm")
    norms = case.tensors["experts.gate_up"].flatten(1).norm(dim=1)
    assert Counter(_sources(case.plan()))[int(norms.argmax())] == 2


@pytest.mark.parametrize(("by", "measure"), [("reap", "saliency"), ("load", "load"), ("knockout", "knockout")])
def test_pruning_takes_the_lowest_and_leaves_the_others_as_they_are(by: str, measure: str) -> None:
    case = _case("prune", num_experts=5, by=by)
    assert case.build().needs == {measure}
    plan = _plan(case, **{measure: [5, 1, 4, 3, 0, 9, 2, 8]})
    assert _sources(plan) == [0, 2, 3, 5, 7]
    assert all(e.down == e.weight == 1 and e.copies == 1 and not e.noise and not e.row_noise for e in plan.experts)
    assert "1, 4, 6" in plan.because


def test_pruning_named_experts_needs_no_score() -> None:
    case = _case("prune", experts=[6, 0])
    assert case.build().needs == frozenset()
    assert _sources(case.plan()) == [1, 2, 3, 4, 5, 7]


def test_a_dead_expert_becomes_a_copy_of_the_busiest_and_shares_its_gradient() -> None:
    plan = _plan(_case("revive", below=0.1), load=[0, 50, 70, 1, 60, 80, 40, 30])
    assert _sources(plan) == [5, 1, 2, 2, 4, 5, 6, 7]
    assert [bool(expert.noise) for expert in plan.experts] == [True, False, False, True, *[False] * 4]
    assert [expert.weight for expert in plan.experts] == [0.5, 1, 0.5, 0.5, 1, 0.5, 1, 1]
    assert not plan.exact
    alive = _plan(_case("revive"), load=[5] * 8)
    assert alive.exact and _sources(alive) == list(range(8))


def test_a_split_deals_every_neuron_to_one_part() -> None:
    for order in ("contiguous", "random"):
        plan = _case("split", parts=3, order=order).plan()
        assert (len(plan.experts), plan.num_experts_per_tok, plan.moe_intermediate_size) == (24, 6, 4)
        for expert in range(8):
            parts = [part.neurons[0].tolist() for part in plan.experts[3 * expert : 3 * expert + 3] if part.neurons]
            assert sorted(itertools.chain(*parts)) == list(range(12))
    whole = SurgeryCase(KNOWN["split"], {"parts": 3}, rows=ExpertRows(("weight",), "whole")).plan()
    assert {expert.down for expert in whole.experts} == {1.0}
    assert {expert.down for expert in plan.experts} == {3.0}


def test_merging_joins_what_is_nearest_weighted_by_load() -> None:
    case = _case("merge", num_experts=6, align=False)
    outputs = np.arange(8.0)[:, None] ** 2 * np.ones(6)  # the nearest: 0, 1 and then 2 to their middle
    plan = _plan(case, outputs=outputs, load=[1, 3, 4, 5, 5, 5, 5, 5])
    assert [expert.sources for expert in plan.experts] == [(0, 1, 2), (3,), (4,), (5,), (6,), (7,)]
    assert plan.experts[0].shares == pytest.approx((1 / 8, 3 / 8, 4 / 8))
    even = _plan(_case("merge", num_experts=6, align=False, shares="even"), outputs=outputs)
    assert even.experts[0].shares == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_dominant_experts_gather_the_others() -> None:
    case = _case("merge", num_experts=2, grouping="dominant", by="coactivation", align=False)
    together = np.eye(8) * 10
    for a, b in ((0, 3), (1, 3), (2, 5), (4, 5), (6, 5), (7, 3)):
        together[a, b] = together[b, a] = 5
    plan = _plan(case, together=together, load=[1, 1, 1, 9, 1, 8, 1, 1])
    assert [expert.sources for expert in plan.experts] == [(0, 1, 3, 7), (2, 4, 5, 6)]


def test_aligning_finds_the_neurons_of_a_shuffled_copy() -> None:
    """Expert 1 is expert 0 with its neurons in another order: its mean with 0 is expert 0."""
    case = _case("merge", num_experts=7, by="router", shares="even")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    gate, up = case.tensors["experts.gate_up"][0].chunk(2)
    case.tensors["experts.gate_up"][1] = torch.cat([gate[order], up[order]])
    case.tensors["experts.down"][1] = case.tensors["experts.down"][0][order]
    case.tensors["router.weight"][1] = case.tensors["router.weight"][0]
    merged = case.plan().experts[0]
    assert merged.sources == (0, 1) and merged.neurons is not None
    first, second = merged.neurons
    down = case.tensors["experts.down"]
    assert torch.equal(down[0][first], down[1][second])


def test_the_matching_is_the_best_of_all_permutations() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 5, 6):
        gain = random.normal(size=(size, size))
        place = grouping.matching(gain)
        assert sorted(place.tolist()) == list(range(size))
        best = max(sum(gain[f, p] for f, p in enumerate(order)) for order in itertools.permutations(range(size)))
        assert gain[np.arange(size), place].sum() == pytest.approx(best)


def test_linkage_averages_over_all_members() -> None:
    """The two groups of the smallest mean over all pairs of their members become one: a loop that keeps no means."""
    for seed in range(6):
        distance = grouping.euclidean_distances(np.random.default_rng(seed).normal(size=(9, 4)))
        groups = [[expert] for expert in range(9)]
        while len(groups) > 1:
            assert grouping.average_linkage(distance, len(groups)) == sorted(sorted(group) for group in groups)
            pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
            a, b = min(pairs, key=lambda pair: distance[np.ix_(groups[pair[0]], groups[pair[1]])].mean())
            groups[b] += groups.pop(a)


def test_experts_are_near_as_often_as_they_are_chosen_together() -> None:
    load = np.array([4.0, 2.0, 2.0])
    together = np.diag(load)
    together[0, 1] = together[1, 0] = 2
    assert grouping.seldom_together(together)[0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("grow", {"num_experts": 8}, "8 is not more than the 8"),
        ("grow", {"num_experts": 40, "by": "load"}, "max_copies: 3"),
        ("grow", {"num_experts": 9, "num_experts_per_tok": 10}, "10 of the 9 experts that are left"),
        ("split", {"parts": 5}, "5 does not divide the 12 neurons"),
        ("split", {"num_experts_per_tok": 17}, "17 of the 16"),
        ("prune", {"num_experts": 1}, "2 of the 1 experts that are left"),
        ("prune", {"num_experts": 8}, "8 of 8 experts stay"),
        ("prune", {"experts": [8]}, "8 is none of the experts 0 .. 7 of layer 1"),
        ("prune", {"experts": [2, 2]}, "names one twice"),
        ("revive", {"experts": [-1]}, "-1 is none of the experts"),
        ("revive", {"experts": list(range(8))}, "all of them can't be made anew"),
        ("merge", {"num_experts": 8}, "8 of 8 stay"),
        ("merge", {"num_experts": 1}, "2 of the 1 experts that are left"),
        ("top_k", {"num_experts_per_tok": 9}, "9 of the 8"),
        ("top_k", {"num_experts_per_tok": 2}, "has 2 already"),
    ],
)
def test_what_shapes_can_t_carry_is_refused_when_it_is_built(name: str, options: dict[str, Any], said: str) -> None:
    found = refuses(_case(name, **options))
    assert found is not None and said in found


def test_a_router_without_rows_can_t_say_which_experts_are_alike() -> None:
    case = SurgeryCase(KNOWN["merge"], {"num_experts": 4, "by": "router"}, rows=ExpertRows())
    assert "a router with a row for each expert" in str(refuses(case))
    assert SurgeryCase(KNOWN["top_k"], {"num_experts_per_tok": 1}, layout=ExpertLayout(3, 2, 4)).plan().experts
