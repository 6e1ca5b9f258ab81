"""What balance losses count where more than the scores chooses: the best scores alone (DeepSeek-V3 eq. 17-20)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelab import BalanceContext, BalanceLossContext, ExpertLayout, LayerRecord, MoEContext, Registry, Routing
from moelab.hookspecs import BALANCE_LOSSES, ROUTERS
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.routing import TokenInfo
from moelab.testing.tensors import fill_parameters, make_info

REGISTRY = Registry(entry_points=False)
SEQUENCES, LENGTH, EXPERTS, TOP_K = 3, 32, 16, 4
CONTEXT = MoEContext(12, EXPERTS, TOP_K, 8, 16, layer_id=0, num_hidden_layers=1, vocab_size=32, allow_noncausal=True)
BIASED: dict[str, dict[str, Any]] = {
    "softmax_topk": {"balance": "bias"},
    "softmax_topk normalised": {"balance": "quantile", "norm_topk_prob": True},
    "softmax_topk capacity": {"balance": "bias", "capacity_factor": 1.0},
    "sigmoid_topk": {},
    "sigmoid_topk groups": {"balance": "none", "n_group": 4, "topk_group": 2},
    "sigmoid_topk groups and bias": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "sqrtsoftplus_topk": {},
}


class Stranger(nn.Module):
    """A biased router as one would write it, which says nothing of balance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, 12))
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        scores = (x @ self.weight.t()).sigmoid()
        expert = (scores + self.bias).topk(TOP_K).indices
        weight = scores.gather(1, expert)
        return Routing.from_topk(expert, weight, EXPERTS, scores=scores, logits=x, token_mask=info.mask)


def build(name: str) -> Any:
    """A router, fed tokens that crowd on few experts, with a bias that sends them elsewhere."""
    if name == "stranger":
        router: Any = Stranger()
    else:
        router = REGISTRY.build(ROUTERS, {"name": name.split(maxsplit=1)[0], **BIASED[name]}, CONTEXT, "router")
    fill_parameters(router, 1)
    if hasattr(router, "bias"):
        router.bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    return router


def batch(padded: bool = False) -> tuple[Tensor, TokenInfo]:
    x = torch.randn(SEQUENCES * LENGTH, 12, generator=torch.Generator().manual_seed(3)) + 0.5
    info = make_info(SEQUENCES, LENGTH, 32, training=True)
    return x, replace(info, mask=info.position < torch.tensor([32, 20, 7])[info.sequence_id]) if padded else info


def record(router: Any, x: Tensor, info: TokenInfo) -> LayerRecord:
    routing = router(x, info)
    return LayerRecord(0, routing, routing.counts(), demand=routing.demand(), info=info)


def loss(name: str, **options: Any) -> Any:
    context = BalanceLossContext({0: ExpertLayout(EXPERTS, TOP_K, 8)})
    return REGISTRY.build(BALANCE_LOSSES, {"name": name, **options}, context, "losses.0")


def score_of(name: str) -> Callable[[Tensor], Tensor]:
    if name.startswith("softmax"):
        return lambda z: z.softmax(-1)
    return torch.sigmoid if not name.startswith("sqrt") else lambda z: nn.functional.softplus(z).sqrt()


def published(name: str, router: Any, x: Tensor, info: TokenInfo, by_sequence: bool) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 eq. 17-20 token by token in float64: value and gradient; or the same over the whole batch."""
    weight = router.weight.detach().double().requires_grad_()
    scores = score_of(name)(x.double() @ weight.t())
    order = scores.detach()
    valid = info.valid()
    parts = [(info.sequence_id == s) & valid for s in range(SEQUENCES)] if by_sequence else [valid]
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        count, mean = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
        for token in rows.nonzero().flatten().tolist():
            best = sorted(range(EXPERTS), key=lambda e, t=token: -float(order[t, e]))[:TOP_K]
            count[best] += EXPERTS / (TOP_K * int(rows.sum()))
            mean = mean + scores[token] / scores[token].sum() / int(rows.sum())
        total = total + (count * mean).sum() * int(rows.sum()) / int(valid.sum())
    (gradient,) = torch.autograd.grad(total, [weight])
    return total.detach(), gradient


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "micro", "global"])
@pytest.mark.parametrize("name", [*BIASED, "stranger"])
def test_a_biased_or_grouped_router_is_balanced_by_its_scores_alone(name: str, scope: str, padded: bool) -> None:
    """Value and gradient; the bias and the groups chose other experts than the best for many tokens."""
    router = build(name)
    x, info = batch(padded)
    r = record(router, x, info)
    assert not torch.equal(r.balance_counts, r.wanted)
    statistics = BatchStatistics()
    statistics.add([r])
    value = loss("load_balance", scope=scope)([r], statistics.context())
    (gradient,) = torch.autograd.grad(value, [router.weight])
    found = value.detach()
    expected, expected_gradient = published(name, router, x, info, scope == "sequence")
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [*BIASED, "stranger"])
def test_other_losses_of_counts_count_the_same(name: str) -> None:
    router = build(name)
    x, info = batch(padded=True)
    r = record(router, x, info)
    expected, _ = published(name, router, x, info, by_sequence=False)
    # No choice of these routers is null, so that loss is load_balance.
    assert float(loss("null_load_balance")([r], BalanceContext(None))) == pytest.approx(float(expected), rel=1e-5)
    if name != "stranger":  # whose logits are none
        logits = r.routing.logits
        from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

        mask = info.valid().view(SEQUENCES, LENGTH).long()
        theirs = load_balancing_loss_func((logits,), EXPERTS, TOP_K, mask)
        assert float(loss("hf_load_balance")([r], BalanceContext(None))) == pytest.approx(float(theirs), rel=1e-5)


def test_the_bias_is_still_told_who_was_chosen() -> None:
    """and drops, demand and `count: choices` too; by default `device`, whose source has groups and no bias."""
    router = build("sigmoid_topk groups and bias")
    x, info = batch(padded=True)
    r = record(router, x, info)
    chosen = torch.zeros(EXPERTS, dtype=torch.int64)
    scores = (x @ router.weight.t()).sigmoid()
    for token in info.valid().nonzero().flatten().tolist():
        chosen[router.select(scores[token : token + 1], info).flatten()] += 1
    statistics = BatchStatistics()
    statistics.add([r])
    context = statistics.context()
    assert torch.equal(statistics.wanted[0], chosen)
    assert torch.equal(r.wanted, chosen)
    assert torch.equal(context.batch_choices[0], chosen)
    assert torch.equal(context.batch_counts[0], r.routing.balance_map.sum(0))
    mean = (scores / scores.sum(-1, keepdim=True))[info.valid()].mean(0)
    load = chosen / chosen.sum()
    for scope in ("micro", "global"):
        found = loss("load_balance", scope=scope, count="choices")([r], context)
        assert float(found) == pytest.approx(float(EXPERTS * (load * mean).sum()), rel=1e-5)
    device = loss("load_balance", scope="device", num_devices=4)([r], context)
    expected = 4 * (load.view(4, -1).sum(-1) * mean.view(4, -1).sum(-1)).sum()
    assert float(device) == pytest.approx(float(expected), rel=1e-5)


def test_a_bias_that_balances_the_batch_leaves_the_loss_its_pull() -> None:
    """The loss of the choices sees balance (1) and pulls no more; that of the scores keeps its value and direction."""
    router = build("sigmoid_topk")
    x, info = batch()
    router.bias.zero_()
    for _ in range(400):
        router.after_step(record(router, x, info).wanted)
    r = record(router, x, info)
    assert float(r.wanted.max() / r.wanted.float().mean()) < 1.5  # balanced: it was above 3
    values, gradients = {}, {}
    for count in ("scores", "choices"):
        value = loss("load_balance", scope="micro", count=count)([r], BalanceContext(None))
        (gradient,) = torch.autograd.grad(value, [router.weight], retain_graph=True)
        values[count], gradients[count] = float(value), gradient.flatten()
    router.bias.zero_()
    unbiased = loss("load_balance", scope="micro")([record(router, x, info)], BalanceContext(None))
    assert values["scores"] == pytest.approx(float(unbiased), rel=1e-6)
    assert values["choices"] < 1 + (values["scores"] - 1) / 4
    assert gradients["choices"].norm() < gradients["scores"].norm() / 2


@pytest.mark.parametrize("name", ["sinkhorn", "noisy_topk", "gshard", "top_p", "null_experts", "moe_plus_plus"])
def test_what_a_router_without_a_bias_shows_to_a_loss(name: str) -> None:
    """A transport plan moves choices as a bias does; noise, thresholds and null experts are the choice itself."""
    context = replace(CONTEXT, num_experts_per_tok=2)
    router = REGISTRY.build(ROUTERS, {"name": name}, context, "router")
    fill_parameters(router, 1)
    x, info = batch()
    routing = router(x, info)
    if name == "sinkhorn":
        best = torch.zeros_like(routing.scores, dtype=torch.bool).scatter_(1, routing.scores.topk(2).indices, True)
        assert torch.equal(routing.balance_map, best)
        assert not torch.equal(best, routing.choice_map())
    else:
        assert routing.counted_top_k == 0
        assert torch.equal(routing.balance_map, routing.choice_map())


def test_a_biased_gshard_shows_the_first_choice_of_its_scores() -> None:
    router = REGISTRY.build(ROUTERS, {"name": "gshard", "balance": "bias"}, replace(CONTEXT, num_experts_per_tok=2), "")
    fill_parameters(router, 1)
    router.bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    x, info = batch()
    routing = router(x, info)
    assert routing.balance_map.sum(1).unique().tolist() == [1]
    assert torch.equal(routing.balance_map.long().argmax(1), routing.scores.argmax(1))


def test_a_plain_router_is_not_searched_twice() -> None:
    """Its choices are its best scores: the counts that are there already serve."""
    router = REGISTRY.build(ROUTERS, {"name": "softmax_topk"}, CONTEXT, "router")
    fill_parameters(router, 1)
    x, info = batch()
    r = record(router, x, info)
    assert r.balance_counts is r.wanted
    assert "balance_map" not in vars(r.routing)
