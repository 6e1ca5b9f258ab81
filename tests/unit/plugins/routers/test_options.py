"""What routers take beside their score: the gate and its start, tables, pools, weights on the input, a steered bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab import ConfigError, LayerRecord, MoEContext, Registry, Routing
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import ROUTERS
from moelab.moe.batch_statistics import BatchStatistics
from moelab.moe.bias import proportional_update
from moelab.moe.block import MoEBlock
from moelab.moe.on_input import weigh_inputs
from moelab.testing.tensors import dense_weights, fill_parameters, make_info

REGISTRY = Registry(entry_points=False)
CONTEXT = MoEContext(16, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)


def build(name: str, top_k: int = 2, experts: int = 8, **options: Any) -> Any:
    context = replace(CONTEXT, num_experts_per_tok=top_k, num_experts=experts)
    router = REGISTRY.build(ROUTERS, {"name": name, **options}, context, "router")
    fill_parameters(router, 1)
    return router


def tokens(count: int = 24) -> Tensor:
    return torch.empty(count, 16).normal_(generator=torch.Generator().manual_seed(0))


def block(router: dict[str, Any], hidden: int = 16, **more: Any) -> MoEBlock:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    moe = MoEConfig(layout=layout, router=router, allow_noncausal=True, **more)
    found = build_model(ModelConfig(64, hidden, 24, 1, 4, 2, moe=moe), REGISTRY).layers[0].mlp
    assert isinstance(found, MoEBlock)
    return found


# ---- The gate ----


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk", "top_p", "expert_choice"])
def test_a_cosine_gate_is_its_formula(name: str) -> None:
    """z_i = min(exp(a), 100) cos(P x + p, W_i), in float64, for any router that projects."""
    router, x = build(name, gate="cosine", cosine_size=6), tokens()
    low = x.double().numpy() @ router.projection.detach().double().numpy().T
    low += router.projection_bias.detach().double().numpy()
    rows = router.weight.detach().double().numpy()
    cosine = low @ rows.T / np.linalg.norm(low, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    for scale in (0.3, 9.0):
        with torch.no_grad():
            router.log_scale.fill_(scale)
        found = router(x, make_info(1, 24, 64, training=False)).logits
        torch.testing.assert_close(found, torch.from_numpy(min(np.exp(scale), 100) * cosine).float())


def test_a_cosine_gate_starts_at_a_scale_of_two_and_a_bias_at_zero() -> None:
    cosine: Any = block({"name": "softmax_topk", "gate": "cosine"}).router
    assert cosine.log_scale.exp().item() == pytest.approx(2.0)
    assert cosine.weight.shape == (8, 256)
    assert cosine.projection.shape == (256, 16)
    assert not block({"name": "softmax_topk", "gate_bias": True}).router.gate_bias.any()  # type: ignore[union-attr]


def test_rows_that_start_of_one_length_point_where_they_were_drawn() -> None:
    drawn: Any = block({"name": "softmax_topk"}).router
    unit: Any = block({"name": "softmax_topk", "start": "unit_rows"}).router
    torch.testing.assert_close(unit.weight, torch.nn.functional.normalize(drawn.weight, dim=-1))
    assert torch.equal(unit.weight, block({"name": "top_p", "start": "unit_rows"}).router.weight)  # type: ignore


@pytest.mark.parametrize("options", [{}, {"gate": "cosine", "cosine_size": 8}])
def test_orthogonal_rows_are_the_drawn_ones_made_orthonormal(options: dict[str, Any]) -> None:
    """The first row keeps its direction, and no row turns round: Gram-Schmidt."""
    drawn: Any = block({"name": "softmax_topk", **options}).router
    router: Any = block({"name": "softmax_topk", "start": "orthogonal", **options}).router
    torch.testing.assert_close(router.weight @ router.weight.t(), torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(router.weight[0], torch.nn.functional.normalize(drawn.weight[0], dim=0))
    assert ((router.weight * drawn.weight).sum(1) > 0).all()


def test_a_gate_that_a_format_knows_nothing_of_is_not_exported() -> None:
    from moelab.hf.names import qwen2_moe_fields

    for options, reason in (({"gate": "cosine"}, "compares directions"), ({"gate_bias": True}, "has a bias")):
        for name in ("softmax_topk", "token_rounding"):
            assert reason in str(qwen2_moe_fields(build(name, **options)))
    assert "what the experts see" in str(qwen2_moe_fields(build("softmax_topk", weights_on="input")))


# ---- Who is chosen ----


def test_a_table_chooses_and_the_scores_weigh() -> None:
    router, info = (
        build("softmax_topk", token_table={"seed": 5}, norm_topk_prob=True),
        make_info(1, 24, 64, training=True),
    )
    routing = router(tokens(), info)
    assert torch.equal(routing.expert.view(24, 2), router.table[info.token_id])
    chosen = routing.scores.gather(1, routing.expert.view(24, 2))
    torch.testing.assert_close(routing.weight.view(24, 2), chosen / chosen.sum(1, keepdim=True))
    assert torch.equal(router.table, build("hash", seed=5).table)  # one dealer of tables
    assert torch.equal(router(-tokens(), info).expert, routing.expert)


def pooled(scores: np.ndarray, documents: list[range], size: int) -> np.ndarray:
    """OLMo-core's rule, document by document and token by token: [T, E] bool."""
    chosen = np.zeros(scores.shape, dtype=bool)
    for document in documents:
        pool = np.argsort(-scores[list(document)].sum(0), kind="stable")[:size]
        for t in document:
            chosen[t, pool[np.argsort(-scores[t][pool], kind="stable")[:2]]] = True
    return chosen


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_topk"])
def test_tokens_choose_within_the_pool_of_their_document(name: str) -> None:
    """Documents may end within a sequence; one that goes on in the next is two, and padding is none of it."""
    more = {"balance": "none"} if name == "sigmoid_topk" else {}
    router = build(name, document_pool={"smallest": 3, "largest": 3}, **more)
    ids = torch.tensor([7] * 5 + [3] * 7 + [3] * 4 + [9] * 8)
    mask = torch.ones(24, dtype=torch.bool)
    mask[-3:] = False
    info = replace(make_info(2, 12, 64, training=True), document_id=ids, mask=mask)
    x = tokens()
    routing = router(x, info)
    scores = routing.scores.detach().double().numpy()
    wanted = pooled(scores, [range(5), range(5, 12), range(12, 16), range(16, 21)], 3)
    assert torch.equal(routing.choice_map()[:21], torch.from_numpy(wanted)[:21])
    free = router(x, replace(info, training=False))  # without `evaluation` every expert may serve there
    assert torch.equal(free.expert.view(24, 2), free.scores.topk(2).indices)


def test_a_document_draws_the_size_of_its_pool() -> None:
    """Uniform over smallest .. largest, one size for all of a document, and others at the next step."""
    router = build("softmax_topk", document_pool={"smallest": 2, "largest": 5})
    ids = torch.arange(64).repeat_interleave(64)
    info = replace(make_info(1, 4096, 64, training=True), document_id=ids)
    routing = router(torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)), info)
    used = torch.zeros(64, 8).index_put((ids[routing.token], routing.expert), torch.ones(())).sum(1)
    counts = torch.bincount(used.long(), minlength=9)
    assert counts[:2].sum() == 0
    assert counts[6:].sum() == 0
    assert (counts[2:6] > 4).all()  # 16 of 64 expected of each


# ---- Weights on the input ----


@pytest.mark.parametrize("more", [{}, {"expert_chunk": 7}])
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_experts_see_their_weight_times_the_token(capacity: float | None, more: dict[str, Any]) -> None:
    """y_t = sum over what is served of f_e(w x_t), expert by expert and token by token."""
    layer = block({"name": "sigmoid_topk", "weights_on": "input", "capacity_factor": capacity}, **more).train()
    fill_parameters(layer, 3)
    x, info = tokens(), make_info(1, 24, 64, training=True)
    weight = dense_weights(layer.router(x, info)).detach()
    gate, up = layer.experts.gate_up.detach().chunk(2, dim=1)
    wanted = torch.zeros(24, 16)
    for t, e in weight.nonzero().tolist():
        seen = weight[t, e] * x[t]
        wanted[t] += (torch.nn.functional.silu(gate[e] @ seen) * (up[e] @ seen)) @ layer.experts.down[e].detach()
    torch.testing.assert_close(layer(x, info)[0], wanted)
    assert (weight > 0).sum() < 48 if capacity else (weight > 0).sum() == 48


@pytest.mark.parametrize("top_k", [2, None])
def test_a_placeholder_gives_nothing_even_where_an_expert_gives_something_for_nothing(top_k: int | None) -> None:
    """An accelerator computes placeholders, and an expert with biases answers to zeros."""
    x, served = tokens(3), torch.tensor([True, False, True, True, False, False])
    routing = Routing.from_topk(torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5), 8).serve(served)
    found = weigh_inputs(lambda rows, _, bank: rows + 1)(x, replace(routing, top_k=top_k, weights_on_input=True), None)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([[1.0], [2.0], [0.0]]) * (0.5 * x + 1))


def test_a_dense_gradient_is_refused_for_weights_on_the_input() -> None:
    layer = block({"name": "softmax_topk", "weights_on": "input"}, backend={"name": "densemixer"}).train()
    with pytest.raises(ConfigError, match="weights_on"):
        layer(tokens(), make_info(1, 24, 64, training=True))


def test_a_dense_gradient_is_refused_for_weights_that_do_not_follow_the_scores() -> None:
    """noisy_topk's are a softmax of noisy logits; in bfloat16 sigmoid_topk's are rounded, and follow them."""
    info = make_info(1, 24, 64, training=True)
    layer = block({"name": "noisy_topk"}, backend={"name": "densemixer"}).train()
    with pytest.raises(ConfigError, match="not a token's scores times one factor"):
        layer(tokens(), info)
    layer = block({"name": "sigmoid_topk", "output_dtype": "bfloat16"}, backend={"name": "densemixer"}).train()
    layer(tokens(), info)


# ---- The bias ----


def test_a_proportional_step_is_what_is_missing() -> None:
    """LongCat's mu (K_e / (K N) - T_i / (K T)), by hand: 10 tokens, 2 choices each, 3 experts and one null."""
    counts = torch.tensor([2, 4, 6, 8])
    found = proportional_update(torch.zeros(3), counts, 0.5, 1.5 / (2 * 3))
    torch.testing.assert_close(found, 0.5 * (0.25 - torch.tensor([0.1, 0.2, 0.3])))
    even = proportional_update(torch.zeros(4), counts, 1.0)
    torch.testing.assert_close(even, 0.25 - torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert torch.equal(proportional_update(torch.ones(4), torch.zeros(4, dtype=torch.int64), 1.0), torch.ones(4))


@pytest.mark.parametrize("target", [0.5, 1.2])
@pytest.mark.parametrize("output", ["zero", "copy"])
def test_the_bias_leads_to_the_experts_that_were_asked_for(target: float, output: str) -> None:
    """On fixed tokens it is an integral controller: real experts end at the target, and even among themselves."""
    router = build(
        "null_experts", num_null_experts=4, null_output=output, balance="proportional", bias_update_rate=0.2,
        target_experts=target,
    )  # fmt: skip
    x, info = tokens(512), make_info(1, 512, 64, training=True)
    before = router(x, info).demand()[:8].sum() / 512
    assert abs(before - target) > 0.1
    for step in range(300):
        router.after_step(router(x, info).demand(), None, step)
    real = router(x, info).demand()[:8] / 512
    assert real.sum().item() == pytest.approx(target, rel=0.05)
    assert real.max() < 1.3 * real.mean()
    assert not router.bias[8:].any()
    assert router.expected_assignments.per_token == target


def test_a_schedule_stops_the_steered_bias_too() -> None:
    router = build("null_experts", balance="proportional", bias_schedule={"decay_from": 3})
    router.after_step(torch.arange(9), None, 3)
    assert not router.bias.any()
    router.after_step(torch.arange(9), None, 2)
    assert router.bias.any()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("softmax_topk", {"gate": "mlp"}, "gate must be one of linear, cosine"),
    ("softmax_topk", {"start": "zeros"}, "start must be one of normal, unit_rows, orthogonal"),
    ("softmax_topk", {"gate": "cosine", "gate_bias": True}, "gate_bias needs gate=linear"),
    ("softmax_topk", {"gate": "cosine", "cosine_size": 4, "start": "orthogonal"}, "8 rows of 4 numbers can't be"),
    ("noisy_topk", {"start": "unit_rows"}, "needs zero_init=false"),
    ("noisy_topk", {"gate": "cosine"}, "needs zero_init=false"),
    ("moe_plus_plus", {"gate_layers": 2, "gate_bias": True}, "a gate of its own"),
    ("sigmoid_topk", {"weights_on": "both"}, "weights_on must be output or input"),
    ("sigmoid_topk", {"token_table": {}}, "the table alone chooses"),
    ("softmax_topk", {"token_table": {}, "n_group": 2, "topk_group": 1}, "the table alone chooses"),
    ("softmax_topk", {"document_pool": {"smallest": 1, "largest": 4}}, "document_pool.smallest: 1 experts"),
    ("softmax_topk", {"document_pool": {"smallest": 4, "largest": 3}}, "smallest <= largest"),
    ("softmax_topk", {"document_pool": {"smallest": 2, "largest": 9}}, "document_pool.largest: 9 experts"),
    ("softmax_topk", {"document_pool": {"smallest": 2, "largest": 3, "evaluation": 1}}, "document_pool.evaluation"),
    ("softmax_topk", {"document_pool": {"smallest": 2, "largest": 3}, "n_group": 2, "topk_group": 1}, "n_group 1"),
    ("softmax_topk", {"document_pool": {"smallest": 2, "largest": 3}, "balance": "quantile"}, "no document_pool"),
    ("null_experts", {"balance": "quantile"}, "none or proportional beside null experts"),
    ("null_experts", {"n_group": 2, "topk_group": 1}, "n_group can't be used beside null experts"),
    ("null_experts", {"target_experts": 1.0}, "needs balance=proportional"),
    ("null_experts", {"balance": "proportional", "target_experts": 2.0}, "below num_experts_per_tok 2"),
    ("null_experts", {"null_output": "constant"}, "null_output must be one of zero, copy"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


def test_a_pool_needs_leave_to_look_ahead() -> None:
    make: Callable[..., Any] = REGISTRY.components(ROUTERS)["softmax_topk"].build
    options = REGISTRY.select(ROUTERS, {"name": "softmax_topk", "document_pool": {"smallest": 2, "largest": 3}}, "r")[1]
    with pytest.raises(ConfigError, match="all of its document"):
        make(options, replace(CONTEXT, allow_noncausal=False))


# ---- Expert threshold ----


def test_before_its_first_step_a_threshold_router_takes_the_best() -> None:
    router = build("expert_threshold")
    routing = router(tokens(), make_info(1, 24, 64, training=True)).compact()
    wanted = torch.zeros(24, 8).scatter_(1, routing.logits.topk(2).indices, 1.0) * routing.scores
    torch.testing.assert_close(dense_weights(routing), wanted)


def test_thresholds_are_the_quantiles_of_the_whole_batch() -> None:
    """After one step on any split of it: each expert serves K / E of the tokens, the best of them, whoever they are."""
    x, found = tokens(512), []
    for parts in (1, 4):
        router = build("expert_threshold")
        statistics = BatchStatistics()
        for part in x.chunk(parts):
            routing = router(part, make_info(1, len(part), 64, training=True))
            statistics.add([LayerRecord(0, routing, routing.counts(), demand=routing.demand())])
        router.after_step(statistics.wanted[0], statistics.mean_statistics(0))
        found.append(router.threshold.clone())
        exact = router(x, make_info(1, 512, 64, training=False)).logits.sort(0, descending=True).values
        assert (router.threshold <= exact[127 - 3]).all()  # 512 K / E = 128, within the width of a bin
        assert (router.threshold >= exact[128 + 3]).all()
    torch.testing.assert_close(found[0], found[1])


def test_a_threshold_follows_slowly_after_its_first_steps() -> None:
    """An exponential mean once 1 / (1 - ema) steps are seen, a plain one before."""
    router, x = build("expert_threshold", threshold_ema=0.5), tokens(256)
    info = make_info(1, 256, 64, training=True)
    at = []
    for shift in (0.0, 8.0, 8.0):
        with torch.no_grad():
            seen = x + shift * router.weight.sum(0) / router.weight.sum(0).square().sum()
        routing = router(seen, info)
        router.after_step(routing.demand(), routing.statistics)
        at.append(router.threshold.sum().item())
    assert at[1] - at[0] == pytest.approx(4.0, rel=0.05)  # the mean of two: half way to a sum that is 8 higher
    assert at[2] - at[0] == pytest.approx(6.0, rel=0.05)


def test_a_cap_drops_the_least_sure_and_counts_them() -> None:
    free, capped = build("expert_threshold"), build("expert_threshold", k_max=2)
    for router in (free, capped):
        router.updates += 1
    info = make_info(1, 24, 64, training=False)
    every, some = free(tokens(), info), capped(tokens(), info)
    assert torch.equal(every.choice_map(), some.choice_map())
    assert some.dropped.item() == every.counts().sum() - some.counts().sum() > 0
    assert torch.equal(dense_weights(every), torch.where(every.logits > 0, every.scores, 0.0))
