"""LongCat-Flash's balance over groups of experts with one of null choices: its equations 3 to 5, choice by choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moelab import BalanceContext, BalanceLossContext, ConfigError, ExpertLayout, LayerRecord, MoEContext, Registry
from moelab.hookspecs import BALANCE_LOSSES, ROUTERS
from moelab.moe.routing import Routing
from moelab.testing.tensors import fill_parameters, make_info

REGISTRY = Registry(entry_points=False)
EXPERTS, NULLS, TOP_K, DEVICES = 8, 4, 3, 4
CONTEXT = MoEContext(16, EXPERTS, TOP_K, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64)


def loss(**options: Any) -> Any:
    node = {"name": "null_load_balance", "kind": "device", "num_devices": DEVICES, **options}
    return REGISTRY.build(BALANCE_LOSSES, node, BalanceLossContext({0: ExpertLayout(EXPERTS, TOP_K, 12)}), "losses.0")


def record(routing: Routing) -> LayerRecord:
    return LayerRecord(0, routing, routing.counts(), None, routing.demand(), make_info(2, 12, 64, training=True))


def biased() -> Routing:
    """24 tokens, some of them padding, through a router whose bias chooses others than its best scores."""
    node = {"name": "null_experts", "num_null_experts": NULLS, "null_output": "copy", "balance": "proportional"}
    router: Any = REGISTRY.build(ROUTERS, node, CONTEXT, "router")
    fill_parameters(router, 1)
    router.bias.copy_(torch.linspace(0.2, 0.0, EXPERTS + NULLS))
    x = torch.empty(24, 16).normal_(generator=torch.Generator().manual_seed(0)) + 0.3
    info = make_info(2, 12, 64, training=True)
    routing = router(x, replace(info, mask=info.position < torch.tensor([12, 7])[info.sequence_id]))
    assert not torch.equal(routing.choice_map(), routing.balance_map)  # else the test below could not tell them apart
    return routing


def equations(routing: Routing, target: float) -> float:
    """sum_j f_j P_j in float64: f_j over all that each token chose, P_j over the softmax."""
    p, chosen = routing.scores, routing.choice_map()
    assert p is not None
    assert routing.token_mask is not None
    tokens = routing.token_mask.nonzero().squeeze(-1).tolist()
    groups = [range(d * EXPERTS // DEVICES, (d + 1) * EXPERTS // DEVICES) for d in range(DEVICES)]
    groups.append(range(EXPERTS, EXPERTS + NULLS))
    total = 0.0
    for j, group in enumerate(groups):
        selected = sum(float(chosen[t, i]) for t in tokens for i in group)
        f = DEVICES / (target * len(tokens)) if j < DEVICES else 1 / ((TOP_K - target) * len(tokens))
        mean = sum(float(p.detach()[t, i]) for t in tokens for i in group) / len(tokens)
        total += f * selected * mean
    return total


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize("target", [None, 1.25, 2.5])
def test_the_loss_is_its_equations(scope: str, target: float | None) -> None:
    routing = biased()
    found = loss(scope=scope, target_experts=target)([record(routing)], BalanceContext(None))
    even = TOP_K * EXPERTS / (EXPERTS + NULLS)
    assert found.item() == pytest.approx(equations(routing, even if target is None else target), rel=1e-5)


def test_micro_counts_its_own_tokens_and_global_the_whole_batch() -> None:
    """The other micro-batches sent everything to the null choices: only `global` knows."""
    routing = biased()
    r = record(routing)
    other = torch.zeros(EXPERTS + NULLS, dtype=torch.int64)
    other[EXPERTS:] = 1_000_000
    context = BalanceContext({0: r.balance_counts}, batch_choices={0: r.wanted + other})
    alone = BalanceContext(None)
    assert loss(scope="micro")([r], context).item() == loss(scope="micro")([r], alone).item()
    nulls = float(routing.scores[routing.token_mask][:, EXPERTS:].sum(-1).mean())  # type: ignore[index]
    f = (EXPERTS + NULLS) / NULLS  # all of K T choices, over (K - K_e) T
    assert loss()([r], context).item() == pytest.approx(f * nulls, rel=1e-3)


def test_the_target_is_where_no_scores_can_gain_and_balance_is_one() -> None:
    """Two real choices and one null a token, evenly: every f is 1, so the loss is 1 whatever the scores are."""
    chosen = torch.zeros(24, EXPERTS + NULLS, dtype=torch.bool)
    for t in range(24):
        chosen[t, [(2 * t) % EXPERTS, (2 * t + 1) % EXPERTS, EXPERTS + t % NULLS]] = True
    even = replace(biased(), choices=chosen, token_mask=None)
    assert even.scores is not None
    scores = even.scores.detach().clone().requires_grad_()
    value = loss(target_experts=2.0)([record(replace(even, scores=scores))], BalanceContext(None))
    assert value.item() == pytest.approx(1.0, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, scores)
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_devices": 3}, "num_devices: 3 does not divide num_experts 8"),
        ({"target_experts": 3.0}, "below num_experts_per_tok 3"),
        ({"kind": "average"}, "are of kind device"),
        ({"convention": "moe_plus_plus"}, "says nothing of kind device"),
        ({"scope": "sequence"}, "scope must be one of micro, global"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        loss(**options)


def test_a_router_without_null_choices_is_sent_to_load_balance() -> None:
    plain: Any = REGISTRY.build(ROUTERS, {"name": "softmax_topk"}, CONTEXT, "router")
    fill_parameters(plain, 1)
    routing = plain(torch.ones(24, 16), make_info(2, 12, 64, training=True))
    with pytest.raises(ConfigError, match="take load_balance with scope: device"):
        loss()([record(routing)], BalanceContext(None))
