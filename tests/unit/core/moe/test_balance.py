"""Losses as a run has them: names, layers, schedules, conventions, and their share of the router's gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moelab import BalanceContext, ConfigError, LayerRecord, Registry, Routing
from moelab.builder import build_balance_losses, build_model, resolve_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.moe.balance import NamedLoss, WeightSchedule, router_gradient_norms
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.coefficients import CONVENTIONS, convert_coefficient

REGISTRY = Registry(entry_points=False)


def config(losses: list[dict[str, Any]], **moe: Any) -> ModelConfig:
    layout = {"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    part = MoEConfig(layout=layout, balance_losses=losses, **moe)
    return ModelConfig(32, 16, 24, 4, 2, 1, moe=part, initializer_range=0.3)


def test_a_schedule_rises_stays_and_falls() -> None:
    schedule = WeightSchedule(warmup_steps=4, decay_from=10, decay_to=20, final=0.5)
    found = [schedule.factor(step) for step in (0, 3, 9, 10, 15, 20, 99)]
    assert found == pytest.approx([0.25, 1, 1, 1, 0.75, 0.5, 0.5])
    assert WeightSchedule(decay_from=5).factor(5) == 0.0  # at once
    assert WeightSchedule(decay_from=0, decay_to=4, shape="cosine").factor(1) == pytest.approx(0.853553)


def test_losses_take_layers_and_schedules_from_the_config() -> None:
    losses = build_balance_losses(
        config([
            {"name": "load_balance", "layers": "1-", "schedule": {"warmup_steps": 2}, "weight": 0.02},
            {"name": "load_balance"},
        ]),
        REGISTRY,
    )  # fmt: skip
    assert [loss.name for loss in losses] == ["load_balance", "load_balance_2"]
    assert losses[0].layers == frozenset({1, 2, 3})
    assert [losses[0].weight_at(step) for step in (0, 1)] == pytest.approx([0.01, 0.02])


def test_only_the_named_layers_are_seen() -> None:
    seen = []

    class Loss:
        weight, needs_batch_counts = 1.0, False

        def __call__(self, records: Any, context: Any) -> torch.Tensor:
            seen.append([r.layer_id for r in records])
            return torch.zeros(())

    model = build_model(config([]), REGISTRY)
    records = model(torch.zeros(1, 4, dtype=torch.int64)).records
    NamedLoss("x", Loss(), layers=frozenset({0, 3}))(records, BalanceContext(None))
    assert seen == [[0, 3]]


def test_resolving_keeps_layers_and_schedules() -> None:
    model = config([{"name": "router_z", "layers": "0,2-3", "schedule": {"warmup_steps": 2}}])
    resolve_model(model, REGISTRY)
    assert model.moe is not None
    assert model.moe.balance_losses == [
        {"name": "router_z", "weight": 0.001, "layers": "0,2-3", "schedule": {"warmup_steps": 2}}
    ]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"layers": "9"}, r"balance_losses\.0\.layers: the model has layers 0 \.\. 3"),
        ({"layers": "top"}, r"balance_losses\.0\.layers: not a layer pattern"),
        ({"schedule": {"warmup": 2}}, r"balance_losses\.0\.schedule\.warmup: no such key; it takes: warmup_steps"),
        ({"schedule": {"shape": "step"}}, r"balance_losses\.0\.schedule: shape must be one of"),
    ],
)
def test_a_wrong_layer_or_schedule_is_refused(node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_balance_losses(config([{"name": "router_z"} | node]), REGISTRY)


def test_a_loss_that_misses_its_scores_names_key_plugin_owner_and_layer() -> None:
    model = config([{"name": "load_balance"}], router={"name": "hash"})
    (loss,) = build_balance_losses(model, REGISTRY)
    records = build_model(model, REGISTRY)(torch.zeros(1, 4, dtype=torch.int64)).records
    expected = (
        r"model\.moe\.balance_losses\.0 \('load_balance' of moelab_plugins\.balance_losses\.load_balance\): layer 0"
    )
    with pytest.raises(ConfigError, match=expected):
        loss(records, BalanceContext(None))


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    class Loss:
        weight, needs_batch_counts = 1.0, False

        def __call__(self, records: Any, context: Any) -> torch.Tensor:
            return torch.zeros(3)

    with pytest.raises(
        ConfigError,
        match=r"balance loss 'mine' of my_lab: returned a tensor of shape \(3,\) in torch.float32, not a float sc",
    ):
        NamedLoss("mine", Loss(), owner="my_lab")([], BalanceContext(None))


def test_coefficients_convert_both_ways_and_as_documented() -> None:
    """Hugging Face's 1e-3 at K = 8 is 8e-3 here; Megatron sums over 24 layers."""
    assert convert_coefficient(1e-3, "huggingface", "moelab", top_k=8, num_layers=24) == pytest.approx(8e-3)
    assert convert_coefficient(1e-3, "megatron", "moelab", top_k=8, num_layers=24) == pytest.approx(24e-3)
    for one in CONVENTIONS:
        for other in CONVENTIONS:
            there = convert_coefficient(0.3, one, other, top_k=4, num_layers=6)
            assert convert_coefficient(there, other, one, top_k=4, num_layers=6) == pytest.approx(0.3)
    (loss,) = build_balance_losses(config([{"name": "load_balance", "convention": "huggingface"}]), REGISTRY)
    assert loss.loss.weight == pytest.approx(0.02)


def test_gradient_norms_are_those_of_each_term_and_each_router() -> None:
    """Gradients (3, 3) and (1, 1) of a router of two numbers, 4 and 0 of one of one."""
    first, second = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([5.0]))
    terms = {"lm_loss": (first * 3).sum() + 4 * second.sum(), "aux": first.sum(), "none": torch.zeros(())}
    norms = router_gradient_norms(terms, [[first], [], [second]])
    assert {name: norm.tolist() for name, norm in norms.items()} == {
        "lm_loss": pytest.approx([18**0.5, 0, 4]),
        "aux": pytest.approx([2**0.5, 0, 0]),
        "none": [0, 0, 0],
    }
    sum(terms.values()).backward()  # the graph is still there


def test_a_router_without_parameters_has_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert router_gradient_norms({"lm_loss": weight.sum()}, [[]])["lm_loss"].tolist() == [0]


def test_batch_statistics_add_up_over_any_split() -> None:
    model = build_model(config([], router={"name": "softmax_topk", "balance": "quantile"}), REGISTRY).train()
    ids = torch.randint(0, 32, (4, 6))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    whole, parts = BatchStatistics(), BatchStatistics()
    whole.add(model(ids, mask).records)
    for rows in (slice(0, 1), slice(1, 4)):
        parts.add(model(ids[rows], mask[rows]).records)
    assert int(whole.tokens) == int(parts.tokens) == 21
    assert all(torch.equal(whole.wanted[layer], parts.wanted[layer]) for layer in range(4))
    blocks = [layer.mlp for layer in model.layers]
    parts.after_step(blocks)
    assert all(float(block.router.bias.abs().sum()) > 0 for block in blocks)


def test_statistics_are_weighted_by_tokens() -> None:
    statistics = BatchStatistics()
    for tokens, value in ((1, 0.0), (3, 4.0)):
        routing = Routing.from_topk(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), 2)
        routing = replace(routing, statistics=torch.tensor([value]))
        statistics.add([LayerRecord(0, routing, routing.counts())])
    assert statistics.mean_statistics(0).tolist() == [3.0]
