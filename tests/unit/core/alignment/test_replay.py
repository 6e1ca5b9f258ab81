"""Recorded experts in place of a router's own: the same bits with the same weights, and a router that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moelab
from moelab.alignment.batches import padded
from moelab.alignment.examples import Answer
from moelab.alignment.replay import Replayed, recorded, weighers
from moelab.config.model import ModelConfig, MoEConfig
from moelab.errors import ConfigError
from moelab.moe.routing import LayerRecord
from moelab.nn.transformer import TokenContext, Transformer

LAYOUT = {"name": "uniform", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))


def built(router: dict[str, Any]) -> Transformer:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return moelab.build(ModelConfig(**sizes | heads, moe=MoEConfig(layout=dict(LAYOUT), router=router)))


ROUTERS = [
    {"name": "softmax_topk", "norm_topk_prob": True},
    {"name": "softmax_topk", "norm_topk_prob": False},
    {"name": "sigmoid_topk"},
]


@pytest.mark.parametrize("router", ROUTERS)
def test_with_equal_weights_the_logits_are_the_same_bits(router: dict[str, Any]) -> None:
    model = built(router)
    for layer in model.layers:
        if hasattr(layer.mlp.router, "bias"):
            layer.mlp.router.bias.normal_(generator=torch.Generator().manual_seed(3))
    own = model(IDS)
    replayed = model(IDS, tokens=TokenContext(routing_override=Replayed(weighers(model), recorded(own.records))))
    assert torch.equal(replayed.logits, own.logits)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_that_has_turned_round_keeps_the_recorded_experts_and_learns_by_its_weights(
    router: dict[str, Any],
) -> None:
    model = built(router)
    routes = recorded(model(IDS).records)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.router.weight.neg_()
    override = Replayed(weighers(model), routes)
    output = model(IDS, tokens=TokenContext(routing_override=override))
    for record in output.records:
        assert torch.equal(recorded([record])[record.layer_id], routes[record.layer_id])
        kept = override.owned([record])[0].routing.expert.view(-1, 2)
        assert not torch.equal(kept, routes[record.layer_id])
    output.logits.square().mean().backward()
    assert all(float(layer.mlp.router.weight.grad.abs().max()) > 0 for layer in model.layers)


def test_tokens_without_a_record_keep_their_routers_choice() -> None:
    model = built(ROUTERS[0])
    routes = {layer: (expert + 1) % 6 for layer, expert in recorded(model(IDS).records).items()}
    known = torch.arange(IDS.numel()) % 2 == 0
    override = Replayed(weighers(model), routes, known)
    records: list[LayerRecord] = model(IDS, tokens=TokenContext(routing_override=override)).records
    for layer, expert in recorded(records).items():
        assert torch.equal(expert[known], routes[layer][known])
        assert torch.equal(expert[~known], override.own[layer].expert.view(-1, 2)[~known])


@pytest.mark.parametrize("router", [{"name": "top_p"}, {"name": "null_experts"}, {"name": "remoe"}])
def test_a_router_of_variable_k_is_refused_by_name(router: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"router '{router['name']}'.*can't be replayed"):
        weighers(built(router))


def test_routes_of_generation_follow_their_answers_through_padding() -> None:
    table = torch.arange(2 * 8 * 2).view(2, 8, 2)  # of both answers
    rows = [
        Answer(torch.arange(n).numpy(), torch.ones(n).bool().numpy(), {0: table[r].numpy()})
        for r, n in ((0, 9), (1, 5))
    ]
    batch = padded(rows, 2, 0)
    assert batch.routed is not None and batch.routed.sum(1).tolist() == [8, 5]
    assert torch.equal(batch.routes[0][0, :8], table[0]) and torch.equal(batch.routes[0][1, :5], table[1, :5])
    (part,) = batch.split(1)
    assert torch.equal(part.routes[0], batch.routes[0])
