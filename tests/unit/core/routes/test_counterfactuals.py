"""Losses under other routes are those of the whole model run anew, though the layers below are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelab.moe.overrides import ByLayer, NextBest, Remove, RemoveAll
from moelab.nn.transformer import TokenContext
from moelab.routes.counterfactuals import Counterfactual, by_layer, losses, removal
from moelab.routes.replay import Replay, trace_batches
from traced_models import PRECISION, make_model, traced


@torch.no_grad()
@pytest.mark.parametrize("router", [{"name": "softmax_topk"}, {"name": "moe_plus_plus"}], ids=str)
def test_each_loss_is_that_of_the_model_run_from_its_beginning(router: dict[str, Any]):
    model, trace = traced(router, layers=3)
    overrides = [{1: Remove({3})}, {2: RemoveAll()}, {0: NextBest(1), 2: Remove({0, 1}, False)}]
    batches = [batch for _, batch in trace_batches(trace)]
    seen = 0
    for told in losses(model, batches, PRECISION, [by_layer(one) for one in overrides]):
        context = TokenContext(
            told.batch.document_id, told.batch.domain_id,
            routing_override=None if told.index < 0 else ByLayer(overrides[told.index]),
        )  # fmt: skip
        whole = model(told.batch.input_ids, targets=told.batch.targets, tokens=context).token_loss
        assert torch.equal(told.loss, whole)
        if told.index < 0:
            own = told
        else:
            assert not torch.equal(told.loss, own.loss), "a change that changes nothing proves nothing"
        seen += 1
    assert seen == 4 * len(batches)


@torch.no_grad()
def test_an_expert_that_no_token_of_a_batch_went_to_costs_nothing():
    model, trace = traced({"name": "softmax_topk"})
    pairs = [(layer, expert) for layer in (0, 1) for expert in range(8)]
    batches = [batch for _, batch in trace_batches(trace, 1)]
    blind = [by_layer({layer: Remove({expert})}) for layer, expert in pairs]
    looking = [removal({layer: [expert]}) for layer, expert in pairs]
    skipped = 0
    for told, full in zip(
        losses(model, batches, PRECISION, looking), losses(model, batches, PRECISION, blind), strict=True
    ):
        if told.index < 0:
            own = told
            continue
        layer, expert = pairs[told.index]
        assert full.loss is not None
        assert (told.loss is None) == (int(own.records[layer].counts[expert]) == 0)
        # To rounding: so few rows are computed in another way where each token has as many.
        torch.testing.assert_close(full.loss, own.loss if told.loss is None else told.loss, rtol=1e-5, atol=1e-5)
        skipped += told.loss is None
    assert 0 < skipped < len(pairs) * len(batches)


@torch.no_grad()
def test_a_swap_is_the_other_models_routes_window_by_window():
    trace = traced({"name": "softmax_topk"}, seed=4)[1]
    model = make_model({"name": "softmax_topk"})
    swap = Counterfactual((0, 1), lambda first, count: Replay(trace, first, count))
    batches = [batch for _, batch in trace_batches(trace, 3)]
    for told in losses(model, batches, PRECISION, [swap]):
        if told.index == 0:
            context = TokenContext(routing_override=Replay(trace, told.first, len(told.batch.input_ids)))
            whole = model(told.batch.input_ids, targets=told.batch.targets, tokens=context).token_loss
            assert torch.equal(told.loss, whole)
