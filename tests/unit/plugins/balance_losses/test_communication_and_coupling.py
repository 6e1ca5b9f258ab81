"""What devices receive, and whether rows of the router fit their experts: each against a loop in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLossContext, ConfigError, ExpertLayout, LayerRecord, MoEContext, Registry
from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import BALANCE_LOSSES, ROUTERS
from moelab.testing.tensors import fill_parameters, make_info

REGISTRY = Registry(entry_points=False)
CONTEXT = MoEContext(16, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64)


def loss(name: str, experts: int = 8, **options: Any) -> Any:
    context = BalanceLossContext({0: ExpertLayout(experts, 2, 12)})
    return REGISTRY.build(BALANCE_LOSSES, {"name": name, **options}, context, "losses.0")


def record(router: str = "softmax_topk", **options: Any) -> LayerRecord:
    """Three sequences of 8, with padding, through a router that prefers some experts."""
    made: Any = REGISTRY.build(ROUTERS, {"name": router, **options}, CONTEXT, "router")
    fill_parameters(made, 1)
    x = torch.empty(24, 16).normal_(generator=torch.Generator().manual_seed(0)) + 0.3
    info = make_info(3, 8, 64, training=True)
    info = replace(info, mask=info.position < torch.tensor([8, 5, 7])[info.sequence_id])
    routing = made(x, info)
    stream = torch.Generator().manual_seed(3)
    gate_up = torch.empty(8, 24, 16).normal_(generator=stream).requires_grad_()
    return LayerRecord(0, routing, routing.counts(), made.weight, routing.demand(), info, gate_up, gate_up[:, :12])


# ---- Communication ----


def received(r: LayerRecord, scope: str, devices: int, limit: int) -> float:
    """DeepSeek-V2's sum f''_d P''_d, token by token; sequences weighed by their length."""
    assert r.info is not None
    assert r.routing.scores is not None
    p, chosen = r.routing.scores.detach().double().numpy(), r.routing.choice_map().numpy()
    valid, sequence = r.info.valid().numpy(), r.info.sequence_id.numpy()
    rows = (
        [np.flatnonzero(valid & (sequence == s)) for s in range(3)] if scope == "sequence" else [np.flatnonzero(valid)]
    )
    total = 0.0
    for part in rows:
        f, mean = np.zeros(devices), np.zeros(devices)
        for t in part:
            for d in range(devices):
                mine = range(d * 8 // devices, (d + 1) * 8 // devices)
                f[d] += devices / (limit * len(part)) * any(chosen[t, e] for e in mine)
                mean[d] += sum(p[t, e] / p[t].sum() for e in mine) / len(part)
        total += len(part) * (f * mean).sum()
    return total / valid.sum()


@pytest.mark.parametrize("scope", ["sequence", "global"])
@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("softmax_topk", {"n_group": 4, "topk_group": 2}),
        ("sigmoid_topk", {"balance": "none"}),
        ("null_experts", {"num_null_experts": 3}),
        ("moe_plus_plus", {}),  # four choices that are no experts: a fourth of twelve is not a fourth of the experts
    ],
)
def test_communication_is_deepseek_v2s_formula(scope: str, router: str, options: dict[str, Any]) -> None:
    r = record(router, **options)
    found = loss("communication", num_devices=4, devices_per_token=2, scope=scope)([r], BalanceContext(None))
    assert found.item() == pytest.approx(received(r, scope, 4, 2), rel=1e-5)


def test_a_token_counts_once_on_a_device_and_balance_is_one() -> None:
    """Two experts on one device are one sending: half of load_balance's count where M is 2, and 1 where M is 1."""
    r = record()
    both = torch.zeros(24, 8, dtype=torch.bool)
    for t in range(24):
        both[t, (t % 4) * 2 : (t % 4) * 2 + 2] = True  # each token on one of 4 devices, in turn
    even = torch.full((24, 8), 1 / 8)
    r = replace(
        r,
        routing=replace(r.routing, choices=both, scores=even, token_mask=None),
        info=make_info(3, 8, 64, training=True),
    )
    for scope in ("sequence", "global"):
        for limit, value in ((1, 1.0), (2, 0.5)):
            term = loss("communication", num_devices=4, devices_per_token=limit, scope=scope)
            assert term([r], BalanceContext(None)).item() == pytest.approx(value)


def test_what_a_batch_of_micro_batches_sends_is_counted_before_any_gradient() -> None:
    """Through the trainer's step: the logged value of four micro-batches is that of the whole."""
    from moelab.data.batches import Batch
    from moelab.training.precision import Precision
    from moelab.training.step import StepSettings, train_step

    terms = [{"name": "communication", "num_devices": 4, "devices_per_token": 2, "scope": "global", "layers": "1"}]
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    config = ModelConfig(64, 16, 24, 2, 4, 2, moe=MoEConfig(layout=layout, balance_losses=terms), initializer_range=0.4)
    ids = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(0))
    same = torch.zeros(8, 16, dtype=torch.int64)
    values = []
    for micro in (8, 2):
        model, losses = build_model(config, REGISTRY), build_balance_losses(config, REGISTRY)
        settings = StepSettings(micro, 1.0, 0, Precision(torch.device("cpu"), torch.float32))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), same, same, None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = train_step(model, optimizer, losses, batch, 0, settings)
        values.append((found.losses["communication"].item(), model.layers[1].mlp.router.weight.detach().clone()))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    torch.testing.assert_close(values[0][1], values[1][1])


# ---- Coupling ----


def loudness(rows: Tensor, gate_up: Tensor) -> np.ndarray:
    gate = gate_up.detach().double().numpy()[:, :12]
    return np.array([[np.linalg.norm(w @ r) for w in gate] for r in rows.detach().double().numpy()])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_coupling_is_its_hinges(alpha: float) -> None:
    r = record()
    assert r.router_weight is not None
    assert r.gate_up is not None
    m, total = loudness(r.router_weight, r.gate_up), 0.0
    for i in range(8):
        for j in range(8):
            if j != i:
                total += max(m[i, j] - alpha * m[i, i], 0) + max(m[j, i] - alpha * m[i, i], 0)
    found = loss("expert_router_coupling", alpha=alpha, noise=False)([r], BalanceContext(None))
    assert found.item() == pytest.approx(total / 64, rel=1e-5)


def test_rows_that_fit_their_experts_cost_nothing_and_no_gradient_is_nan() -> None:
    """Expert e hears direction e alone, and row e points there: M is diagonal."""
    r = record()
    rows, gate_up = torch.zeros(8, 16, requires_grad=True), torch.zeros(8, 24, 16, requires_grad=True)
    with torch.no_grad():
        rows[range(8), range(8)] = 1.0
        gate_up[range(8), 0, range(8)] = 1.0
    value = loss("expert_router_coupling")([replace(r, router_weight=rows, gate_up=gate_up)], BalanceContext(None))
    assert value.item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert torch.isfinite(rows.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(gate_up.grad).all()  # type: ignore[arg-type]


def test_noise_leaves_a_row_nearer_to_itself_than_to_any_other() -> None:
    """And is the same at a second look, since a layer may be computed twice."""
    term, r = loss("expert_router_coupling"), record()
    assert r.router_weight is not None
    rows = r.router_weight.detach()
    factors = term._noise(rows, r)
    assert torch.equal(factors, term._noise(rows, r))
    moved = (rows * factors - rows).norm(dim=1)
    apart = torch.cdist(rows, rows).fill_diagonal_(float("inf")).amin(1)
    assert (moved < apart / 2).all()
    assert (moved > 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("communication", {"scope": "micro"}, "scope must be one of sequence, global"),
        ("communication", {"devices_per_token": 9}, "devices_per_token must be in 1 .. num_devices 8"),
        ("communication", {"num_devices": 3, "devices_per_token": 1}, "num_devices: 3 does not divide num_experts 8"),
        ("expert_router_coupling", {"alpha": -1.0}, "alpha must not be negative"),
    ],
)
def test_an_impossible_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loss(name, **options)


def test_coupling_refuses_a_router_whose_rows_no_expert_can_see() -> None:
    with pytest.raises(ConfigError, match="layer 0: this loss sends the router's rows"):
        loss("expert_router_coupling")([record(gate="cosine", cosine_size=6)], BalanceContext(None))
    with pytest.raises(ConfigError, match="layer 0: this loss needs a router with a 'weight'"):
        loss("expert_router_coupling")([replace(record(), router_weight=None)], BalanceContext(None))
