"""Each loss against its closed form, transformers, or an independent float64 loop, to 1e-6."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLossContext, ConfigError, ExpertLayout, LayerRecord, Registry, Routing
from moelab.hookspecs import BALANCE_LOSSES
from moelab.testing.tensors import make_info

REGISTRY = Registry(entry_points=False)
ALONE = BalanceContext(None)


def build(name: str, experts: int = 2, top_k: int = 1, layers: int = 1, **options: Any) -> Any:
    layouts = {i: ExpertLayout(experts, top_k, 4) for i in range(layers)}
    return REGISTRY.build(BALANCE_LOSSES, {"name": name, **options}, BalanceLossContext(layouts), "losses.0")


def record(p: Any, top_k: int = 1, layer: int = 0, sequences: int = 1, mask: Tensor | None = None) -> LayerRecord:
    """What a softmax top-K router with these probabilities [T, E] would record."""
    p = torch.as_tensor(p, dtype=torch.float64)
    weight, expert = p.topk(top_k)
    routing = Routing.from_topk(expert, weight, p.shape[1], scores=p, logits=p.log(), token_mask=mask)
    info = make_info(sequences, len(p) // sequences, 4, training=True)
    return LayerRecord(layer, routing, routing.counts(), info=info)


def random(tokens: int, experts: int, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=stream, dtype=torch.float64)).softmax(-1)


P = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]
MASK = torch.tensor([True] * 5 + [False])


def value(name: str, r: LayerRecord, context: BalanceContext = ALONE, **options: Any) -> float:
    experts = r.routing.num_experts
    return float(build(name, experts, r.routing.top_k or 1, **options)([r], context))


@pytest.mark.parametrize("scope", ["micro", "global", "sequence"])
def test_load_balance_of_switch(scope: str) -> None:
    """f = [.75, .25], P = [.65, .35], so 2 * (.75 * .65 + .25 * .35) = 1.15."""
    assert value("load_balance", record(P), scope=scope) == pytest.approx(1.15, abs=1e-6)


def test_load_balance_of_a_collapsed_router_is_experts_over_k() -> None:
    collapsed = torch.tensor([[1.0 - 3e-9, 1e-9, 1e-9, 1e-9]]).repeat(6, 1)
    assert value("load_balance", record(collapsed)) == pytest.approx(4.0, abs=1e-6)
    two = torch.tensor([[0.5 - 1e-9, 0.5 - 1e-9, 1e-9, 1e-9]]).repeat(6, 1)
    assert value("load_balance", record(two, top_k=2)) == pytest.approx(2.0, abs=1e-6)


def test_load_balance_counts_the_whole_batch() -> None:
    """f from elsewhere, P from here: f = [.5, .5] makes it 1 whatever P is."""
    context = BalanceContext({0: torch.tensor([70, 70])})
    assert value("load_balance", record(P), context) == pytest.approx(1.0, abs=1e-6)
    context = BalanceContext({0: torch.tensor([10, 30])})
    assert value("load_balance", record(P), context) == pytest.approx(2 * (0.25 * 0.65 + 0.75 * 0.35), abs=1e-6)


def test_load_balance_by_sequence_weighs_sequences_by_length() -> None:
    p = random(6, 4)
    mask = torch.tensor([True, True, True, True, False, False])
    expected = 0.0
    for first, length in ((0, 3), (3, 1)):
        part = p[first : first + length].numpy()
        f = np.bincount(part.argsort(-1)[:, -2:].ravel(), minlength=4) / (2 * length)
        expected += length / 4 * 4 * (f * part.mean(0)).sum()
    found = value("load_balance", record(p, 2, sequences=2, mask=mask), scope="sequence")
    assert found == pytest.approx(expected, abs=1e-6)


def test_load_balance_over_devices() -> None:
    """Three of four choices and .7 of the probability on device 0 of two: 2 * (.75 * .7 + .25 * .3)."""
    p = [[0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.1, 0.2], [0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.1, 0.2]]
    context = BalanceContext({0: torch.tensor([2, 1, 0, 1])})
    found = value("load_balance", record(p), context, scope="device", num_devices=2)
    assert found == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3), abs=1e-6)


def test_load_balance_normalises_sigmoid_scores() -> None:
    half = replace(record(P), routing=replace(record(P).routing, scores=torch.tensor(P) * 0.37))
    assert value("load_balance", half) == pytest.approx(1.15, abs=1e-6)


def test_load_balance_sees_what_was_asked_for_before_drops() -> None:
    r = record(P)
    dropped = r.routing.serve(torch.tensor([True, False, True, False]))
    routing = replace(dropped, choices=r.routing.choice_map())
    after = LayerRecord(0, routing, routing.counts(), demand=routing.demand(), info=r.info)
    for scope in ("micro", "sequence"):
        assert value("load_balance", after, scope=scope) == pytest.approx(1.15, abs=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_hf_load_balance_equals_transformers(padded: bool) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    layers = [random(10, 8, seed).float() for seed in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]) if padded else None
    expected = load_balancing_loss_func(tuple(p.log() for p in layers), 8, 2, mask)
    flat = None if mask is None else mask.view(-1).bool()
    records = [record(p, 2, layer, sequences=2, mask=flat) for layer, p in enumerate(layers)]
    found = build("hf_load_balance", 8, 2, layers=3)(records, ALONE)
    assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_hf_load_balance_refuses_layers_of_other_counts() -> None:
    layouts = {0: ExpertLayout(4, 2, 4), 1: ExpertLayout(8, 2, 4)}
    with pytest.raises(ConfigError, match=r"losses\.0 \('hf_load_balance'.*differ"):
        REGISTRY.build(BALANCE_LOSSES, {"name": "hf_load_balance"}, BalanceLossContext(layouts), "losses.0")


def test_router_z_of_zero_logits_is_the_squared_log_of_experts() -> None:
    for experts, expected in ((64, 17.296), (60, 16.764)):
        r = record(torch.full((3, experts), 1 / experts))
        zeros = replace(r, routing=replace(r.routing, logits=torch.zeros(3, experts)))
        assert value("router_z", zeros) == pytest.approx(expected, abs=1e-3)
        assert value("router_z", zeros) == pytest.approx(math.log(experts) ** 2, abs=1e-5)


def test_router_z_skips_padding() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    r = record(random(6, 4), mask=MASK)
    r = replace(r, routing=replace(r.routing, logits=z))
    expected = np.mean([np.log(np.exp(row).sum()) ** 2 for row in z[:5].numpy()])
    assert value("router_z", r) == pytest.approx(expected, abs=1e-6)


def test_importance_is_the_squared_variation() -> None:
    """Sums 3 and 1: variance 1 by mean 4; the unbiased variance would give .5."""
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0])
    routing = Routing.from_topk(torch.tensor([[0], [0], [0], [1]]), weight[:, None], 2)
    assert value("importance", LayerRecord(0, routing, routing.counts())) == pytest.approx(0.25, abs=1e-6)


def test_noisy_load_equals_a_loop() -> None:
    """P(z_i + n > the K-th largest of the others' noisy logits), by expert and token."""
    stream = torch.Generator().manual_seed(3)
    clean, noise, std = (torch.randn(7, 5, generator=stream, dtype=torch.float64) for _ in range(3))
    std = std.abs() + 0.1
    noisy = clean + noise * std
    routing = Routing.from_topk(noisy.topk(2).indices, torch.ones(7, 2), 5, scores=clean.softmax(-1), logits=clean)
    routing = replace(routing, extras={"noisy_logits": noisy, "noise_std": std})
    load = np.zeros(5)
    for t in range(7):
        for i in range(5):
            others = np.delete(noisy[t].numpy(), i)
            kth = np.sort(others)[-2]
            load[i] += 0.5 * (1 + math.erf((clean[t, i].item() - kth) / std[t, i].item() / math.sqrt(2)))
    expected = load.var() / load.mean() ** 2
    assert value("noisy_load", LayerRecord(0, routing, routing.counts())) == pytest.approx(expected, abs=1e-6)


def test_entropies_at_their_ends() -> None:
    even = torch.full((8, 8), 1 / 8)
    sure = torch.eye(8)
    collapsed = torch.eye(8)[:1].repeat(8, 1)
    log = math.log(8)
    for p, token, batch, information in ((even, log, 0, 0), (sure, 0, 0, -log), (collapsed, 0, log, 0)):
        r = record(p.clamp_min(1e-12))
        assert value("entropy", r, kind="token") == pytest.approx(token, abs=1e-6)
        assert value("entropy", r, kind="batch") == pytest.approx(batch, abs=1e-6)
        assert value("entropy", r, kind="mutual_information") == pytest.approx(information, abs=1e-6)


def test_orthogonality_of_two_rows() -> None:
    """e0 = (1, 0), e1 = (1, 1): a cosine of sqrt(1/2) off the diagonal, so .25; simbal: 1 + 2 * 1."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    r = replace(record(P), router_weight=weight)
    assert value("router_orthogonality", r) == pytest.approx(0.25, abs=1e-6)
    assert value("router_orthogonality", r, kind="simbal") == pytest.approx(3.0, abs=1e-6)
    assert value("router_orthogonality", replace(r, router_weight=torch.eye(2))) == pytest.approx(0.0, abs=1e-6)


def test_similarity_of_copies_is_one_and_of_others_the_mean_cosine() -> None:
    stream = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 4, 5, generator=stream), torch.randn(3, 2, 5, generator=stream)
    flat = torch.cat([gate_up.flatten(1), down.flatten(1)], 1).double().numpy()
    cosines = [
        flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    r = replace(record(random(4, 3)), gate_up=gate_up, down=down)
    assert value("expert_similarity", r) == pytest.approx(np.mean(cosines), abs=1e-6)
    copies = replace(r, gate_up=gate_up[:1].repeat(3, 1, 1), down=down[:1].repeat(3, 1, 1))
    assert value("expert_similarity", copies) == pytest.approx(1.0, abs=1e-6)


def _remoe(z: Tensor, mask: Tensor | None = None) -> LayerRecord:
    scores = z.relu()
    token, expert = scores.nonzero(as_tuple=True)
    routing = Routing.from_assignments(
        token, expert, scores[token, expert], len(z), z.shape[1], scores=scores, logits=z, token_mask=mask
    )
    return LayerRecord(0, routing, routing.counts())


def test_remoe_l1_equals_its_formula() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    relu = z[:5].relu().numpy()
    expected = sum(4 * (relu[:, i] > 0).sum() / (2 * 5) * relu[:, i].mean() for i in range(4))
    found = build("remoe_l1", 4, 2)([_remoe(z, MASK)], ALONE)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_remoe_steers_its_coefficient_and_remembers_it() -> None:
    """lambda_0 * 1.2^n after n steps with too many active experts; back down with too few."""
    loss = build("remoe_l1", 4, 2, weight=1e-8, factor=1.2)
    dense, sparse = (BalanceContext({0: torch.full((4,), c)}, torch.tensor(10)) for c in (8, 3))
    for _ in range(5):
        loss.after_step(dense)
    assert loss.weight == pytest.approx(1e-8 * 1.2**5)
    loss.after_step(sparse)
    assert loss.weight == pytest.approx(1e-8 * 1.2**4)
    other = build("remoe_l1", 4, 2)
    other.load_state_dict(loss.state_dict())
    assert other.weight == loss.weight


def test_null_choices_are_weighted_or_share_their_load() -> None:
    """Two experts and two nulls; f = [.5, .25, .25, 0], P = [.4, .3, .2, .1]."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).repeat(4, 1)
    choices = torch.zeros(4, 4, dtype=torch.bool)
    choices[torch.arange(4), torch.tensor([0, 0, 1, 2])] = True
    routing = Routing.from_topk(
        torch.tensor([[0], [0], [1], [1]]), torch.ones(4, 1), 2, scores=p, logits=p.log()
    ).serve(torch.tensor([True, True, True, False]))
    routing = replace(routing, choices=choices)
    r = LayerRecord(0, routing, routing.counts(), demand=routing.demand())
    weighted = 4 * (0.5 * 0.4 + 0.25 * 0.3 + 0.75 * 0.25 * 0.2)
    average = 4 * (0.5 * 0.4 + 0.25 * 0.3 + 0.125 * (0.2 + 0.1))
    assert value("null_load_balance", r) == pytest.approx(weighted, abs=1e-6)
    assert value("null_load_balance", r, kind="average") == pytest.approx(average, abs=1e-6)


def test_depth_predictor_is_binary_cross_entropy() -> None:
    logit, chosen = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([True, True, False])
    r = record(random(3, 2))
    r = replace(r, routing=replace(r.routing, extras={"depth_logit": logit, "depth_chosen": chosen}))
    expected = (math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 3
    assert value("depth_predictor", r) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("load_balance", {"scope": "batch"}, "scope must be one of micro, sequence, global, device"),
        ("load_balance", {"scope": "device", "num_devices": 3}, "num_devices: 3 does not divide num_experts 2"),
        ("load_balance", {"convention": "hugingface"}, "did you mean 'huggingface'"),
        ("entropy", {"kind": "x"}, "kind must be one of"),
        ("remoe_l1", {"factor": 0.9}, "factor must be greater than 1"),
        ("null_load_balance", {"tau": -1.0}, "tau must not be negative"),
    ],
)
def test_an_impossible_option_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


def test_missing_scores_are_named() -> None:
    r = record(P)
    bare = replace(r, routing=replace(r.routing, scores=None), layer_id=7)
    with pytest.raises(ConfigError, match="layer 7: this loss needs scores"):
        build("load_balance", scope="micro")([bare], ALONE)
    with pytest.raises(ConfigError, match="layer 0: this loss needs 'noisy_logits', which only the router noisy_topk"):
        build("noisy_load")([r], ALONE)
