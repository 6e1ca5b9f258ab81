"""How far routes agree, and what chosen and rejected answers load, against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from moelab.alignment.measures import RouteMeasures, overlap
from moelab.moe.routing import LayerRecord, Routing


def routing(choices: list[list[int]], experts: int = 4, mask: list[bool] | None = None) -> Routing:
    """Of tokens that each take these experts, any number of them."""
    pairs = [(token, expert) for token, row in enumerate(choices) for expert in row]
    token, expert = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Routing.from_assignments(
        token, expert, torch.ones(len(pairs)), len(choices), experts,
        token_mask=None if mask is None else torch.tensor(mask),
    )  # fmt: skip


def record(layer: int, routed: Routing) -> LayerRecord:
    return LayerRecord(layer, routed, routed.counts())


def test_agreement_is_the_share_of_the_top_k_and_of_the_larger_set_where_k_varies() -> None:
    mine, other = routing([[0, 1], [0, 1], [2, 3], []]), routing([[0, 1], [1, 2], [0], []])
    assert overlap(mine, other).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert overlap(routing([[0, 1, 2]]), routing([[0]])).tolist() == [pytest.approx(1 / 3)]


def test_agreement_counts_no_padding_and_pairs_layers_by_number() -> None:
    measures = RouteMeasures()
    mask = [True, True, False]
    measures.add_reference(
        [record(0, routing([[0], [1], [2]], mask=mask)), record(3, routing([[0], [1], [2]], mask=mask))],
        [record(3, routing([[0], [0], [2]], mask=mask))],
    )
    found = measures.metrics()
    assert found == {"moe/layer_03/route_agreement": 0.5, "moe/mean/route_agreement": 0.5}
    assert measures.metrics() == {}


def test_loads_of_chosen_and_rejected_are_of_the_answers_tokens_alone() -> None:
    """Two sequences of three tokens: the first token is the prompt, in both; then chosen 0, 1 against rejected 0, 2."""
    measures = RouteMeasures()
    answers = torch.tensor([[0, 1, 1], [0, 1, 1]])
    measures.add_pairs([record(0, routing([[3], [0], [1], [3], [0], [2]]))], answers)
    assert measures.metrics()["moe/layer_00/chosen_rejected_load"] == pytest.approx(0.5)  # half would have to move
    measures.add_pairs([record(0, routing([[3], [0], [1], [2], [1], [0]]))], answers)
    assert measures.metrics()["moe/layer_00/chosen_rejected_load"] == 0.0
