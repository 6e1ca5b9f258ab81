"""Forced along recorded routes, a model of equal weights gives equal bits, whatever its router; another is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.data.batches import Batch
from moelab.errors import DataError
from moelab.nn.transformer import TokenContext, Transformer
from moelab.routes.files import read_trace, write_trace
from moelab.routes.replay import Replay, check_replayable, trace_batches
from traced_models import traced

ROUTERS: list[dict[str, Any]] = [
    {"name": "softmax_topk"}, {"name": "softmax_topk", "norm_topk_prob": True, "n_group": 4, "topk_group": 2},
    {"name": "sigmoid_topk"}, {"name": "switch"}, {"name": "gshard"}, {"name": "noisy_topk"}, {"name": "sinkhorn"},
    {"name": "hash"}, {"name": "top_p", "top_p": 0.6}, {"name": "remoe"},
    {"name": "null_experts", "num_null_experts": 4},
    {"name": "moe_plus_plus"}, {"name": "expert_choice"}, {"name": "mixture_of_depths", "capacity": 0.5},
    {"name": "token_rounding", "tile": 2}, {"name": "forced_random"},
    {"name": "softmax_topk", "eval_capacity_factor": 0.7},
]  # fmt: skip


def _logits(model: Transformer, batch: Batch, override: Replay | None) -> torch.Tensor:
    context = TokenContext(batch.document_id, batch.domain_id, routing_override=override)
    logits = model(batch.input_ids, tokens=context).logits
    assert logits is not None
    return logits


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_equal_weights_give_equal_bits(tmp_path: Path, router: dict[str, Any]):
    model, trace = traced(router)
    write_trace(trace, tmp_path / "t")
    trace = read_trace(tmp_path / "t")
    check_replayable(trace, model, "t")
    for first, batch in trace_batches(trace):
        forced = _logits(model, batch, Replay(trace, first, len(batch.input_ids)))
        assert torch.equal(forced, _logits(model, batch, None))


@torch.no_grad()
@pytest.mark.parametrize("router", [{"name": "softmax_topk"}, {"name": "top_p", "top_p": 0.6}], ids=str)
def test_the_routes_are_the_traces_and_not_the_models(router: dict[str, Any]):
    """Another seed's routes, in batches of another size: the records hold what the trace says."""
    trace = traced(router)[1]
    model = traced(router, seed=5)[0]
    for first, batch in trace_batches(trace, 3):
        override = Replay(trace, first, len(batch.input_ids))
        context = TokenContext(batch.document_id, batch.domain_id, routing_override=override)
        for record in model(batch.input_ids, tokens=context).records:
            layer = trace.layer(record.layer_id)
            assert layer is not None
            begin, end = layer.starts[first * 16], layer.starts[(first + len(batch.input_ids)) * 16]
            assert record.routing.expert.tolist() == layer.expert[begin:end].tolist()
            assert record.routing.weight.tolist() == layer.weight[begin:end].tolist()


def test_an_override_of_one_layer_moves_gradients_along_its_routes():
    """Experts that the trace leaves out get no gradient: the routes are obeyed backward too."""
    model, trace = traced({"name": "softmax_topk"})
    first, batch = next(trace_batches(trace))
    here = replace(trace.layers[0], expert=trace.layers[0].expert % 4)
    override = Replay(replace(trace, layers=[here, *trace.layers[1:]]), first, len(batch.input_ids))
    model.train()
    loss = model(batch.input_ids, targets=batch.targets, tokens=TokenContext(routing_override=override)).token_loss
    loss.mean().backward()
    gradient = model.layers[0].mlp.experts.down.grad.abs().sum((1, 2))
    assert (gradient[:4] > 0).all()
    assert (gradient[4:] == 0).all()


def test_a_trace_of_another_model_is_refused():
    trace = traced({"name": "softmax_topk"})[1]
    with pytest.raises(DataError, match=r"0-1 \(8 experts\), and the model has 0-2 \(8 experts\)"):
        check_replayable(trace, traced({"name": "softmax_topk"}, layers=3)[0], "t")
    with pytest.raises(DataError, match="41 tokens"):
        check_replayable(replace(trace, facts=trace.facts | {"vocab_size": 41}), traced({"name": "switch"})[0], "t")
