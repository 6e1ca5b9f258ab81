"""Routers against what their papers and released code do, where that is easily got wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLossContext, ConfigError, ExpertLayout, LayerRecord, MoEContext, Registry
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import BALANCE_LOSSES, ROUTERS
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.bias import margin_histogram, quantile_update
from moelab.testing.tensors import dense_weights, fill_parameters, make_info

REGISTRY = Registry(entry_points=False)
CONTEXT = MoEContext(16, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)


def build(name: str, top_k: int = 2, experts: int = 8, **options: Any) -> Any:
    context = replace(CONTEXT, num_experts_per_tok=top_k, num_experts=experts)
    router = REGISTRY.build(ROUTERS, {"name": name, **options}, context, "router")
    fill_parameters(router, 1)
    return router


def tokens(count: int) -> Tensor:
    return torch.empty(count, 16).normal_(generator=torch.Generator().manual_seed(0))


# ---- MoE++ ----


@pytest.mark.parametrize("weights", ["paper", "released"])
def test_the_partner_of_a_zero_expert_weighs_what_its_source_says(weights: str) -> None:
    """Paper eq. 1: its own probability. Released code: one, "equivalent to that of the other expert alone" (3.1)."""
    router, x = build("moe_plus_plus", weights=weights), tokens(256)
    routing = router(x, make_info(1, 256, 64, training=True))
    with_zero = routing.choice_map()[:, 8] & routing.choice_map()[:, :8].any(1)  # zero expert and a real one
    assert with_zero.sum() > 10
    found = dense_weights(routing)[with_zero].sum(1)
    probability = torch.where(routing.choice_map()[:, :8], routing.scores[:, :8], 0.0)[with_zero].sum(1)
    torch.testing.assert_close(found, probability if weights == "paper" else torch.ones_like(found))


def test_two_zero_experts_give_nothing() -> None:
    router = build("moe_plus_plus", num_zero_experts=2, num_copy_experts=0, num_constant_experts=0, weights="released")
    with torch.no_grad():
        router.weight.zero_()
        router.weight[8:, 0] = 50.0
    routing = router(torch.ones(3, 16), make_info(1, 3, 64, training=True))
    assert torch.equal(dense_weights(routing), torch.zeros(3, 8))
    assert torch.equal(routing.bypass, torch.zeros(3, 16))


def test_constants_start_as_in_the_released_code_and_the_gate_may_have_two_layers() -> None:
    router = {"name": "moe_plus_plus", "gate_layers": 2, "num_constant_experts": 6}
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    moe = MoEConfig(layout=layout, router=router, balance_losses=[])
    model = build_model(ModelConfig(32, 256, 24, 1, 4, 2, moe=moe, initializer_range=0.02), REGISTRY)
    found = dict(model.layers[0].mlp.router.named_parameters())
    choices = 8 + 1 + 1 + 6
    assert found["constant"].shape == (6, 256)
    assert found["hidden"].shape == (8 * choices, 256)
    assert found["weight"].shape == (choices, 8 * choices)
    stds = {name: float(parameter.std()) for name, parameter in found.items()}
    assert stds.pop("constant") == pytest.approx(1.0, rel=0.1)  # 1,536 draws of N(0, 1)
    assert all(std == pytest.approx(0.02, rel=0.2) for std in stds.values()), stds


@pytest.mark.parametrize("experts", [8, 16])
def test_null_load_balance_in_moe_plus_plus_own_units_is_its_equation_7(experts: int) -> None:
    """sum_i eta_i f_i P_i, f_i the share of tokens that select i: K / E' of ours (6 times less for 8 + 4 and K = 2)."""
    router, x = build("moe_plus_plus", experts=experts), tokens(64)
    info = make_info(2, 32, 64, training=True)
    routing = router(x, info)
    record = LayerRecord(0, routing, routing.counts(), demand=routing.demand(), info=info)
    f, p = np.zeros(experts + 4), np.zeros(experts + 4)
    for t in range(64):
        scores = routing.scores[t].detach().double().numpy()
        f[np.argsort(-scores)[:2]] += 1 / 64
        p += scores / 64
    eta = np.array([1.0] * experts + [0.75] * 4)
    values = {}
    for convention in ("moe_plus_plus", "moelab"):
        node = {"name": "null_load_balance", "convention": convention}
        context = BalanceLossContext({0: ExpertLayout(experts, 2, 4)})
        loss = REGISTRY.build(BALANCE_LOSSES, node, context, "losses.0")
        values[convention] = float(loss([record], BalanceContext(None)))
    assert values["moe_plus_plus"] == pytest.approx((eta * f * p).sum(), rel=1e-5)
    assert values["moelab"] / values["moe_plus_plus"] == pytest.approx((experts + 4) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "code"}, "weights must be one of paper, released"),
        ({"gate_layers": 3}, "gate_layers must be 1 or 2"),
        ({"constant_std": -1.0}, "constant_std must not be negative"),
    ],
)
def test_an_impossible_option_of_moe_plus_plus_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("moe_plus_plus", **options)


# ---- Token rounding ----


def rounded(scores: np.ndarray, top_k: int, tile: int, how: str) -> np.ndarray:
    """SonicMoE's benchmark (moe-token-rounding.py), token by token and expert by expert: weights [T, E]."""
    count, experts = scores.shape
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    weights = scores.copy()
    chosen = np.zeros_like(scores, dtype=bool)
    for t in range(count):
        weights[t, best[t]] = scores[t, best[t]] / scores[t, best[t]].sum()
        chosen[t, best[t]] = True
    out = np.zeros_like(scores)
    for e in range(experts):
        tiles = chosen[:, e].sum() / tile
        target = int({"nearest": np.round, "up": np.ceil, "down": np.floor}[how](tiles)) * tile
        rank = sorted(range(count), key=lambda t, e=e: (not chosen[t, e], -weights[t, e]))
        for t in rank[:target]:
            out[t, e] = weights[t, e]
    return out


@pytest.mark.parametrize("how", ["nearest", "up", "down"])
def test_token_rounding_serves_whom_its_code_serves_with_the_same_weights(how: str) -> None:
    router, x = build("token_rounding", tile=8, rounding=how), tokens(160)
    routing = router(x, make_info(2, 80, 64, training=True))
    expected = rounded(routing.scores.detach().double().numpy(), 2, 8, how)
    torch.testing.assert_close(dense_weights(routing).double(), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_half_a_tile_goes_to_the_even_count() -> None:
    """Two, six and four tokens want experts 0, 1 and 2, in tiles of four: none, eight and four are served."""
    logits = torch.zeros(12, 3)
    logits[:2, 0] = logits[2:8, 1] = logits[8:, 2] = 1.0
    router = build("token_rounding", top_k=1, experts=3, tile=4)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :12] = logits.t()
    routing = router(torch.eye(12, 16), make_info(1, 12, 64, training=True))
    assert routing.counts().tolist() == [0, 8, 4]


# ---- The selection bias ----


def skewed(count: int, experts: int = 16) -> Tensor:
    stream = torch.Generator().manual_seed(5)
    return torch.randn(count, experts, generator=stream) + 1.5 * torch.randn(experts, generator=stream)


def violation(scores: Tensor, bias: Tensor, top_k: int) -> float:
    counts = torch.bincount((scores + bias).topk(top_k).indices.flatten(), minlength=scores.shape[1])
    return float(counts.max() / counts.float().mean() - 1)


@pytest.mark.parametrize("score", [torch.sigmoid, lambda z: z.softmax(-1), lambda z: z.exp().log1p().sqrt()])
def test_quantile_bias_is_that_of_the_whole_batch_and_no_mean_of_parts(score: Any) -> None:
    """Kimi K3 eq. 14 in float64 on all tokens, to 3 % of how far the bias moves; the same for any split."""
    scores, top_k = score(skewed(1024)), 4
    bias = torch.zeros(16)
    cutoff = scores.double().topk(top_k + 1).values[:, -1:]
    exact = -torch.quantile(scores.double() - cutoff, 1 - top_k / 16, dim=0)
    exact = (exact - exact.mean()).float()
    whole = quantile_update(bias, margin_histogram(scores, bias, top_k, None), top_k, 0.0)
    reach = float((exact - bias).abs().max())
    torch.testing.assert_close(whole, exact, atol=0.03 * reach, rtol=0)
    mask = torch.ones(1536, dtype=torch.bool)
    mask[1000:1512] = False
    padded = torch.cat([scores[:1000], torch.full((512, 16), 7.0), scores[1000:]])
    for parts in ([(0, 1536)], [(0, 40), (40, 1010), (1010, 1536)]):
        total = torch.zeros(16 * 1000)
        for first, last in parts:
            shares = margin_histogram(padded[first:last], bias, top_k, mask[first:last])
            total += shares * mask[first:last].sum() / 1024
        torch.testing.assert_close(quantile_update(bias, total, top_k, 0.0), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", [torch.sigmoid, lambda z: z.softmax(-1), lambda z: z.exp().log1p().sqrt()])
def test_quantile_balancing_balances_within_a_few_steps_at_any_scale(score: Any) -> None:
    """MaxVio falls to a tenth of the unbiased one in six steps, also where scores are a thousandth of that."""
    for scale in (1.0, 1e-3):
        scores, top_k = scale * score(skewed(1024)), 4
        bias = torch.zeros(16)
        before = violation(scores, bias, top_k)
        for _ in range(6):
            bias = quantile_update(bias, margin_histogram(scores, bias, top_k, None), top_k, 0.0)
        assert violation(scores, bias, top_k) < before / 10


def test_no_token_teaches_a_quantile_bias_nothing() -> None:
    bias = torch.tensor([0.3, -0.3, 0.0, 0.0])
    for mask in (torch.zeros(5, dtype=torch.bool), None):
        count = 0 if mask is None else 5
        shares = margin_histogram(torch.rand(count, 4), bias, 2, mask)
        assert torch.equal(shares, torch.zeros(4000))
        torch.testing.assert_close(quantile_update(bias, shares, 2, 0.0), bias)


@pytest.mark.parametrize("balance", ["bias", "quantile"])
def test_a_bias_follows_its_schedule_and_then_stands_still(balance: str) -> None:
    """DeepSeek-V3 4.2 ends with a rate of 0; the step is told by the trainer, so a resumed run needs no state."""
    options = {"balance": balance, "bias_centred": False}
    schedule = {"decay_from": 4, "decay_to": 6}
    scheduled, plain = build("sigmoid_topk", **options, bias_schedule=schedule), build("sigmoid_topk", **options)
    x, info = tokens(64), make_info(1, 64, 64, training=True)
    moves = []
    for step in range(8):
        before = scheduled.bias.clone()
        for router in (scheduled, plain):
            routing = router(x, info)
            statistics = BatchStatistics()
            statistics.add([LayerRecord(0, routing, routing.counts(), demand=routing.demand())])
            block = type("Block", (), {"router": router, "layer_id": 0})()
            statistics.after_step([block], step)
        if step <= 4:
            assert torch.equal(scheduled.bias, plain.bias)
        moves.append(float((scheduled.bias - before).abs().max()))
    assert moves[6] == moves[7] == 0.0
    assert moves[0] > 0
    if balance == "bias":
        assert moves[:6] == pytest.approx([1e-3] * 5 + [5e-4])
    assert set(scheduled.state_dict()) == set(plain.state_dict())


def test_a_schedule_is_checked_when_the_router_is_built() -> None:
    with pytest.raises(ConfigError, match=r"router: 'sigmoid_topk' .*final must not be negative"):
        build("sigmoid_topk", bias_schedule={"decay_from": 3, "final": -1.0})
    with pytest.raises(ConfigError, match=r"router\.bias_schedule\.from: 'sigmoid_topk'"):
        build("sigmoid_topk", bias_schedule={"from": 3})


# ---- docs/metrics.md ----


@pytest.mark.parametrize(("experts", "top_k", "count"), [(64, 8, 4096), (8, 1, 1024), (256, 8, 4096)])
def test_the_documented_violation_of_a_fair_router_is_an_upper_estimate(experts: int, top_k: int, count: int) -> None:
    """At most about sqrt(2 ln E E / (T K)): the mean over 20 draws lies between half of it and all."""
    stream = torch.Generator().manual_seed(0)
    scores = [torch.rand(count, experts, generator=stream) for _ in range(20)]
    found = np.mean([violation(s, torch.zeros(experts), top_k) for s in scores])
    bound = np.sqrt(2 * np.log(experts) * experts / (count * top_k))
    assert bound / 2 < found < bound
