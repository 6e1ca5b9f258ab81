"""Each router against an independent float64 loop or a closed form, to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moelab import ConfigError, MoEContext, Registry, Routing
from moelab.hookspecs import ROUTERS
from moelab.testing.tensors import dense_weights, fill_parameters, make_info

TOLERANCE = 1e-6
REGISTRY = Registry(entry_points=False)
CONTEXT = MoEContext(16, 8, 2, 12, 32, layer_id=0, num_hidden_layers=2, vocab_size=64, allow_noncausal=True)


def build(name: str, top_k: int = 2, experts: int = 8, **options: Any) -> Any:
    context = replace(CONTEXT, num_experts_per_tok=top_k, num_experts=experts)
    router = REGISTRY.build(ROUTERS, {"name": name, **options}, context, "router")
    fill_parameters(router, 1)
    return router


def tokens(count: int = 24, seed: int = 0) -> Tensor:
    return torch.empty(count, 16).normal_(generator=torch.Generator().manual_seed(seed))


def logits_router(name: str, logits: list[list[float]] | Tensor, top_k: int, **options: Any) -> tuple[Any, Tensor]:
    """A router whose logits for the rows of the returned x are exactly these."""
    wanted = torch.as_tensor(logits, dtype=torch.float32)
    router = build(name, top_k, wanted.shape[1], **options)
    x = torch.eye(len(wanted), 16)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, : len(wanted)] = wanted.t()
    return router, x


def info(batch: int = 1, length: int = 24, training: bool = False) -> Any:
    return make_info(batch, length, 64, training=training)


def top(values: np.ndarray, k: int) -> list[int]:
    return list(np.argsort(-values, kind="stable")[:k])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(router: Any, x: Tensor, row: Callable[[np.ndarray], dict[int, float]]) -> Tensor:
    """Token by token in float64: `row` maps logits [E] to {expert: weight}."""
    z = x.double().numpy() @ router.weight.detach().double().numpy().T
    out = torch.zeros(len(x), router.num_experts, dtype=torch.float64)
    for t, logits in enumerate(z):
        for expert, weight in row(logits).items():
            out[t, expert] = weight
    return out


def _plain(normalise: bool) -> Callable[[np.ndarray], dict[int, float]]:
    def row(z: np.ndarray) -> dict[int, float]:
        p = softmax(z)
        chosen = top(p, 2)
        return {i: p[i] / (p[chosen].sum() if normalise else 1) for i in chosen}

    return row


def _scored(score: Callable[[np.ndarray], np.ndarray], scale: float = 1.0) -> Callable[[np.ndarray], dict[int, float]]:
    def row(z: np.ndarray) -> dict[int, float]:
        s = score(z)
        chosen = top(s, 2)
        return {i: scale * s[i] / s[chosen].sum() for i in chosen}

    return row


def _grouped(z: np.ndarray) -> dict[int, float]:
    s = 1 / (1 + np.exp(-z))
    groups = s.reshape(4, 2)
    kept = top(groups.sum(1), 2)  # the sum of a group's two best, of two
    allowed = np.array([s[i] if i // 2 in kept else -np.inf for i in range(8)])
    chosen = top(allowed, 2)
    return {i: s[i] / s[chosen].sum() for i in chosen}


def _top_p(z: np.ndarray) -> dict[int, float]:
    p = softmax(z)
    found, mass = {}, 0.0
    for i in top(p, 8):
        found[i] = p[i]
        mass += p[i]
        if mass >= 0.6:
            break
    return found


def _null(z: np.ndarray) -> dict[int, float]:
    p = softmax(z)
    real = [i for i in top(p, 2) if i < 8]
    return {i: p[i] / p[real].sum() for i in real}


FORMULAS: list[tuple[str, dict[str, Any], Callable[[np.ndarray], dict[int, float]]]] = [
    ("softmax_topk", {}, _plain(False)),
    ("softmax_topk", {"norm_topk_prob": True}, _plain(True)),
    ("softmax_topk", {"topk_first": True}, lambda z: dict(zip(top(z, 2), softmax(z[top(z, 2)]), strict=True))),
    ("gshard", {}, _plain(True)),
    ("token_rounding", {}, _plain(True)),
    ("token_rounding", {"norm_topk_prob": False}, _plain(False)),
    ("sinkhorn", {}, _plain(False)),
    ("noisy_topk", {}, lambda z: dict(zip(top(z, 2), softmax(z[top(z, 2)]), strict=True))),
    ("sigmoid_topk", {"routed_scaling_factor": 2.5}, _scored(lambda z: 1 / (1 + np.exp(-z)), 2.5)),
    ("sigmoid_topk", {"n_group": 4, "topk_group": 2}, _grouped),
    ("sqrtsoftplus_topk", {}, _scored(lambda z: np.sqrt(np.log1p(np.exp(z))))),
    ("top_p", {"top_p": 0.6}, _top_p),
    ("remoe", {}, lambda z: {i: z[i] for i in range(8) if z[i] > 0}),
    ("null_experts", {"num_null_experts": 4}, _null),
]


@pytest.mark.parametrize(("name", "options", "row"), FORMULAS, ids=[f"{n}{o}" for n, o, _ in FORMULAS])
def test_weights_equal_a_float64_loop(name: str, options: dict[str, Any], row: Any) -> None:
    router, x = build(name, **options), tokens()
    found = dense_weights(router(x, info()))
    torch.testing.assert_close(found.double(), reference(router, x, row), atol=TOLERANCE, rtol=TOLERANCE)


def test_switch_takes_the_best_expert_with_its_probability() -> None:
    router, x = build("switch", top_k=1), tokens()
    expected = reference(router, x, lambda z: {top(z, 1)[0]: softmax(z).max()})
    torch.testing.assert_close(dense_weights(router(x, info())).double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_switch_refuses_two_experts_a_token() -> None:
    with pytest.raises(ConfigError, match=r"num_experts_per_tok 2; use softmax_topk"):
        build("switch", top_k=2)


def test_equal_logits_give_equal_weights() -> None:
    x = torch.zeros(4, 16)
    assert torch.equal(build("softmax_topk")(x, info(1, 4)).weight, torch.full((8,), 1 / 8))
    assert torch.equal(build("softmax_topk", norm_topk_prob=True)(x, info(1, 4)).weight, torch.full((8,), 1 / 2))


def test_a_bias_moves_the_choice_and_never_the_weights() -> None:
    router, x = logits_router("sigmoid_topk", [[0.0, 1.0, 2.0, 3.0]], 1, norm_topk_prob=False)
    router.bias.copy_(torch.tensor([10.0, 0, 0, 0]))
    routing = router(x, info(1, 1))
    assert (routing.expert.item(), routing.weight.item()) == (0, 0.5)


def test_bias_steps_towards_the_under_used_experts() -> None:
    """Loads 6, 2, 2, 2 at a rate of 1e-3, with and without centring (2408.15664)."""
    for centred, expected in ((False, [-1, 1, 1, 1]), (True, [-1.5, 0.5, 0.5, 0.5])):
        router = build("sigmoid_topk", experts=4, bias_update_rate=1e-3, bias_centred=centred)
        router.after_step(torch.tensor([6, 2, 2, 2]))
        torch.testing.assert_close(router.bias, 1e-3 * torch.tensor(expected))


def test_negative_biased_scores_stay_within_their_groups() -> None:
    """Masking with zero would let a masked group win over negative scores."""
    router, x = logits_router("sigmoid_topk", [[3.0, 2.9, 0.0, 0.1]], 2, n_group=2, topk_group=1)
    router.bias.fill_(-5.0)
    assert sorted(router(x, info(1, 1)).expert.tolist()) == [0, 1]


def test_quantile_balancing_finds_the_balanced_bias_in_one_step() -> None:
    """Scores [[.9, .1], [.8, .2], [.7, .3], [.6, .4]]: any bias that takes .4 to .6 off expert 0 serves two each."""
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    router, x = logits_router("softmax_topk", scores.log(), 1, balance="quantile")
    routing = router(x, info(1, 4, training=True))
    assert routing.statistics is not None
    router.after_step(routing.demand(), routing.statistics)
    assert 0.4 < float(router.bias[1] - router.bias[0]) < 0.6
    assert float(router.bias.sum()) == pytest.approx(0.0, abs=1e-7)
    assert router(x, info(1, 4)).demand().tolist() == [2, 2]


def test_capacity_keeps_the_heaviest_or_the_first() -> None:
    """Four tokens want expert 0 of two; each takes ceil(1 * 4 / 2) = 2."""
    logits = [[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [4.0, 0.0]]
    for policy, kept in (("probs", [1, 3]), ("position", [0, 1])):
        router, x = logits_router("softmax_topk", logits, 1, capacity_factor=1.0, drop_policy=policy)
        routing = router(x, info(1, 4, training=True))
        assert routing.compact().token.tolist() == kept
        assert (int(routing.dropped), routing.counts().tolist(), routing.demand().tolist()) == (2, [2, 0], [4, 0])
        assert router(x, info(1, 4)).served is None  # dropless in evaluation


def test_first_choices_are_served_before_second_ones() -> None:
    """GShard's order: token 0's second choice must not displace token 2's first."""
    logits = [[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]]
    router, x = logits_router("softmax_topk", logits, 2, capacity_factor=0.5, drop_policy="position")
    kept = router(x, info(1, 4, training=True)).compact()
    assert sorted(zip(kept.token.tolist(), kept.expert.tolist(), strict=True)) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_padding_takes_no_capacity() -> None:
    router, x = logits_router("softmax_topk", [[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], 1, capacity_factor=2.0)
    mask = torch.tensor([False, False, True, True])
    routing = router(x, replace(info(1, 4, training=True), mask=mask))
    assert routing.compact().token.tolist() == [2, 3]


def test_gshard_serves_the_second_expert_by_chance() -> None:
    """With w2 = 0.1 about one in five second choices serves, and losses count first choices alone."""
    count = 16
    z = math.log(9.0)  # normalised weights 0.9 and 0.1
    router, x = logits_router("gshard", torch.tensor([[z, 0.0]]).repeat(count, 1), 2)
    served = sum(
        int(router(x, replace(info(1, count, True), generator=torch.Generator().manual_seed(seed))).counts()[1])
        for seed in range(100)
    )
    assert 0.17 < served / (100 * count) < 0.23
    assert router(x, info(1, count)).demand().tolist() == [count, 0]


def test_noise_spreads_the_choice_in_training_only() -> None:
    router = build("noisy_topk", top_k=1, experts=4)
    router.initialise(torch.Generator().manual_seed(0))
    x = tokens(400)
    assert set(router(x, info(1, 400)).expert.tolist()) == {int(torch.zeros(4).topk(1).indices)}
    counts = router(x, info(1, 400, training=True)).counts()
    assert counts.min() > 60  # all logits zero: noise alone decides, 100 each


def test_sinkhorn_plan_equals_the_closed_form() -> None:
    """Megatron's example: the plan, its margins, and the token that moves over."""
    from moelab_plugins.routers.sinkhorn import transport_plan

    z = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0.9, 0]], dtype=torch.float64)
    plan = transport_plan(z, None, 50).exp()
    torch.testing.assert_close(plan[0], torch.tensor([0.12656, 0.12344], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(plan[3], torch.tensor([0.12031, 0.12969], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 0.25, dtype=torch.float64), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((2,), 0.5, dtype=torch.float64), atol=TOLERANCE, rtol=0)
    assert plan.argmax(1).tolist() == [0, 0, 0, 1]


def test_hash_deals_ids_evenly_and_distinctly() -> None:
    router = build("hash", top_k=3)
    assert router.table[:, 0].bincount(minlength=8).tolist() == [8] * 8
    assert all(len(set(row)) == 3 for row in router.table.tolist())
    assert not torch.equal(router.table, build("hash", top_k=3, seed=1).table)


def test_hash_balances_by_frequency(tmp_path: Path) -> None:
    """One id as frequent as all others together has an expert to itself."""
    counts = np.ones(64)
    counts[5] = 63.0
    np.save(tmp_path / "counts.npy", counts)
    table = build("hash", top_k=1, experts=2, frequencies=str(tmp_path / "counts.npy")).table[:, 0]
    mass = np.bincount(table.numpy(), weights=counts)
    assert mass.tolist() == [63.0, 63.0]


def test_hash_names_a_file_that_is_no_list_of_counts(tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"must hold 64 counts"):
        build("hash", frequencies=str(tmp_path / "counts.json"))


def test_top_p_is_capped_and_says_what_it_dropped() -> None:
    router, x = logits_router("top_p", torch.zeros(3, 4), 1, top_p=0.9, k_max=2)
    routing = router(x, info(1, 3))
    assert (routing.counts().sum().item(), routing.demand().sum().item(), int(routing.dropped)) == (6, 12, 6)


def test_all_null_choices_give_exactly_nothing() -> None:
    router = build("null_experts", num_null_experts=4)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[8:, 0] = 50.0
    routing = router(torch.ones(3, 16), info(1, 3))
    assert torch.equal(routing.weight, torch.zeros(6))
    assert routing.compact().expert.numel() == 0
    assert routing.demand()[8:].sum() == 6


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("released", [False, True])
def test_moe_plus_plus_adds_copies_and_constants(released: bool, layers: int) -> None:
    """Against a float64 loop over tokens and choices, gating residual included, as the paper and as its code."""
    router = build("moe_plus_plus", weights="released" if released else "paper", gate_layers=layers)
    x = tokens()
    below = torch.randn(24, 12)
    previous = Routing.from_topk(torch.zeros(24, 1, dtype=torch.int64), torch.ones(24, 1), 8, logits=below)
    routing = router(x, replace(info(), previous=previous))
    w = {key: value.detach().double().numpy() for key, value in router.named_parameters()}
    dense, bypass = np.zeros((24, 8)), np.zeros((24, 16))
    for t, row in enumerate(x.double().numpy()):
        hidden = row if layers == 1 else np.tanh(w["hidden"] @ row)
        p = softmax(w["weight"] @ hidden + w["residual"] @ below[t].double().numpy())
        chosen = top(p, 2)
        for i in chosen:
            weight = 0.0 if i == 8 and released else p[i]
            if released:
                weight /= p[[j for j in chosen if j != 8]].sum()
            if i < 8:
                dense[t, i] = weight
            elif i == 9:  # after one zero expert: the copy
                bypass[t] += weight * row
            elif i > 9:
                a = softmax((w["constant_gate"] @ row).reshape(2, 2)[i - 10])
                bypass[t] += weight * (a[0] * row + a[1] * w["constant"][i - 10])
    torch.testing.assert_close(dense_weights(routing).double(), torch.tensor(dense), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(routing.bypass.double(), torch.tensor(bypass), atol=4e-6, rtol=TOLERANCE)
    assert (np.abs(bypass).sum(1) > 0).any()


def test_expert_choice_fills_every_expert_exactly() -> None:
    """C = K S / E of each sequence, the largest scores, padding never: against a loop."""
    router, x = build("expert_choice"), tokens(2 * 12)
    mask = torch.ones(24, dtype=torch.bool)
    mask[20:] = False  # the second sequence has 8 of 12 tokens
    routing = router(x, replace(info(2, 12, training=True), mask=mask))
    assert routing.counts().tolist() == [3 + 2] * 8
    p = np.array([softmax(z) for z in x.double().numpy() @ router.weight.detach().double().numpy().T])
    expected = np.zeros((24, 8))
    for first, length in ((0, 12), (12, 8)):
        for e in range(8):
            for t in top(p[first : first + length, e], length * 2 // 8):
                expected[first + t, e] = p[first + t, e]
    torch.testing.assert_close(dense_weights(routing).double(), torch.tensor(expected), atol=TOLERANCE, rtol=TOLERANCE)


def test_expert_choice_learns_the_threshold_it_infers_by() -> None:
    router, x = build("expert_choice"), tokens()
    routing = router(x, info(training=True))
    router.after_step(routing.demand(), routing.statistics)
    assert torch.equal(router.threshold, routing.statistics)  # the first step counts whole
    causal = router(x, info())
    # All chosen in training lie at or above the C-th score, and the C-th itself is not above it.
    assert causal.counts().tolist() == [count - 1 for count in routing.counts().tolist()]


@pytest.mark.parametrize("name", ["expert_choice", "mixture_of_depths", "sinkhorn", "token_rounding"])
def test_a_noncausal_router_refuses_a_decoder(name: str) -> None:
    context = replace(CONTEXT, allow_noncausal=False)
    with pytest.raises(ConfigError, match=rf"'{name}' of moelab_plugins\.routers\.{name}.*allow_noncausal=true"):
        REGISTRY.build(ROUTERS, {"name": name}, context, "model.moe.router")


def test_depth_processes_its_share_and_skips_the_rest() -> None:
    router, x = build("mixture_of_depths", capacity=0.25), tokens(2 * 8)
    routing = router(x, info(2, 8, training=True)).compact()
    r = (x @ router.depth_weight.t()).squeeze(-1)
    chosen = [b * 8 + t for b in range(2) for t in r[b * 8 : b * 8 + 8].topk(2).indices.tolist()]
    assert sorted(set(routing.token.tolist())) == sorted(chosen)
    sums = dense_weights(routing).sum(-1)[chosen]
    torch.testing.assert_close(sums, r[chosen].sigmoid())


def test_depth_never_processes_padding_even_when_all_else_is_unwanted() -> None:
    router = build("mixture_of_depths", capacity=0.5)
    with torch.no_grad():
        router.depth_weight.copy_(-torch.ones(1, 16))
    mask = torch.tensor([True] * 4 + [False] * 4)
    x = torch.where(mask[:, None], torch.rand(8, 16), -torch.ones(8, 16))  # r < 0 for tokens, > 0 for padding
    routing = router(x, replace(info(1, 8, training=True), mask=mask)).compact()
    assert len(set(routing.token.tolist())) == 2
    assert mask[routing.token].all()


@pytest.mark.parametrize(("rounding", "expected"), [("nearest", [8, 4]), ("up", [8, 8]), ("down", [4, 4])])
def test_counts_are_rounded_to_tiles(rounding: str, expected: list[int]) -> None:
    """Seven tokens want expert 0 and five expert 1, in tiles of four."""
    logits = torch.tensor([[1.0, 0.0]] * 7 + [[0.0, 1.0]] * 5) * torch.linspace(1, 2, 12)[:, None]
    router, x = logits_router("token_rounding", logits, 1, tile=4, rounding=rounding)
    routing = router(x, info(1, 12, training=True))
    assert routing.counts().tolist() == expected
    wanted = routing.choice_map()
    served = dense_weights(routing.compact()) > 0
    if rounding == "down":
        assert not (served & ~wanted).any()
    assert routing.demand().tolist() == [7, 5]


def test_forced_routing_is_balanced_and_says_so() -> None:
    turns = build("forced_round_robin", top_k=2)
    assert turns(tokens(), info(2, 12)).counts().tolist() == [6] * 8
    chance = build("forced_random", top_k=2)
    counts = chance(tokens(400), info(1, 400, training=True)).counts()
    assert counts.sum() == 800
    assert counts.min() > 60
    assert turns.forced
    assert chance.forced


def test_jitter_is_for_training_only() -> None:
    router, x = build("switch", top_k=1, input_jitter=0.1), tokens()
    plain = build("switch", top_k=1, input_jitter=0.0)
    assert torch.equal(router(x, info()).logits, plain(x, info()).logits)
    ratio = router(x, info(training=True)).logits / plain(x, info(training=True)).logits
    assert 0.0 < (ratio - 1).abs().median() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_group": 3}, "n_group: 3 does not divide num_experts 8"),
        ({"n_group": 8, "topk_group": 1}, "hold fewer than num_experts_per_tok 2"),
        ({"n_group": 2, "topk_group": 3}, "topk_group: 3 exceeds n_group 2"),
        ({"balance": "sign"}, "balance must be one of none, bias, proportional, quantile"),
        ({"capacity_factor": -1.0}, "capacity_factor must be positive"),
        ({"drop_policy": "any"}, "drop_policy must be one of"),
        ({"score_dtype": "float8"}, "score_dtype must be one of"),
        ({"balance": "quantile", "n_group": 2, "topk_group": 2}, "quantile needs n_group 1"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("sigmoid_topk", **options)


def test_precision_is_an_option_and_float32_by_default() -> None:
    x = tokens()
    router = build("softmax_topk")
    wanted = router(x, info()).logits
    narrow = build("softmax_topk", projection_dtype="bfloat16", score_dtype="bfloat16", output_dtype="bfloat16")
    routing = narrow(x, info())
    assert 1e-4 < (routing.logits - wanted).abs().max() < 0.2
    assert torch.equal(routing.weight, routing.weight.bfloat16().float())
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.float32
    following = build("softmax_topk", parameter_dtype="model").to(torch.bfloat16)
    assert following.weight.dtype == torch.bfloat16
    torch.testing.assert_close(router.double()(x.double(), info()).logits, x.double() @ router.weight.t())
