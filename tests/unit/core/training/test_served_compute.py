"""What a run counts as served is what its experts executed: for every registered router, in every setting of a layer.

Executed rows are counted by a backend that looks at what it is handed, and by torch's FlopCounterMode, which sees the
matrix products themselves; neither knows anything of records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moelab
from moelab import ConfigError, ExpectedAssignments, Registry, Routing
from moelab.builder import build_balance_losses, build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.data.batches import Batch
from moelab.hookspecs import ROUTERS
from moelab.moe.block import MoEBlock
from moelab.moe.experts import ExpertBank
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import flops_per_token, served_costs
from moelab.nn.transformer import Transformer
from moelab.testing.tensors import make_info
from moelab.training.precision import Precision
from moelab.training.progress import Progress
from moelab.training.step import StepSettings, train_step
from moelab_plugins.expert_backends.loop import LoopBackend

REGISTRY = Registry(entry_points=False)
D, E, K, F, V = 16, 8, 2, 12, 64
B, S = 4, 24


class Stranger(nn.Module):
    """Declares nothing; serves none to three experts by token id, some of them twice, some with weight 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, E * D).view(E, D))

    def forward(self, x: Tensor, info: Any) -> Routing:
        choice = torch.arange(3).expand(len(x), 3)
        expert = (info.token_id[:, None] * 5 + choice * (info.token_id[:, None] % 2)) % E
        kept = choice <= info.token_id[:, None] % 4 - 1
        scores = (x @ self.weight.t()).softmax(-1)
        weight = scores.gather(1, expert) * (info.token_id[:, None] % 5 > 0)
        token = torch.arange(len(x)).repeat_interleave(3)[kept.reshape(-1)]
        return Routing.from_assignments(
            token, expert.reshape(-1)[kept.reshape(-1)], weight.reshape(-1)[kept.reshape(-1)], len(x), E,
            scores=scores, token_mask=info.mask,
        )  # fmt: skip


def names() -> list[str]:
    return sorted(REGISTRY.components(ROUTERS))


def config(
    router: dict[str, Any], layers: int = 2, patterns: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """A layout of 8 experts, 2 a token, or 1 for a router that takes no other."""
    top_k = 1 if router["name"] in ("switch", "base") else K
    moe = {
        "layout": {"name": "uniform", "num_experts": E, "num_experts_per_tok": top_k, "moe_intermediate_size": F},
        "router": router,
        "shared_expert": {"name": "gated", "intermediate_size": 20},
        "backend": {"name": "loop"},
        "allow_noncausal": True,
    }
    moe = MoEConfig(**{**moe, **changes}, layers=patterns or {})
    return ModelConfig(V, D, 32, layers, 2, 1, initializer_range=0.2, moe=moe)


class Spy(LoopBackend):
    """Counts the rows it is handed, by expert."""

    def __init__(self, experts: int) -> None:
        self.rows = torch.zeros(experts, dtype=torch.int64)

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        self.rows += torch.bincount(routing.expert, minlength=len(self.rows))
        return super().__call__(x, routing, bank)


def blocks(model: Transformer) -> list[MoEBlock]:
    return [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEBlock)]


def batch(mask: Tensor | None = None) -> Batch:
    ids = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(3))
    same = torch.arange(B)[:, None].expand(B, S).contiguous()
    targets = ids[:, 1:].contiguous()
    if mask is not None:
        targets = targets.masked_fill(~mask, -100)
    return Batch(ids[:, :-1].contiguous(), targets, same, torch.zeros_like(same), mask)


def step(
    model_config: ModelConfig,
    *,
    micro: int = B,
    mask: Tensor | None = None,
    before: Callable[[Transformer], None] = lambda model: None,
) -> tuple[Transformer, Tensor, Tensor]:
    """One training step -> the model, what was counted as served, and the rows that were executed: both [sum of E]."""
    model = build_model(model_config, REGISTRY, seed=1)
    losses = build_balance_losses(model_config, REGISTRY)
    for block in blocks(model):
        block.backend = Spy(block.layout.num_experts)
    before(model)
    settings = StepSettings(micro, 0.0, 0, Precision(torch.device("cpu"), torch.float32))
    result = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), losses, batch(mask), 0, settings)
    assert result.served is not None
    return model, result.served, torch.cat([block.backend.rows for block in blocks(model)])


def options_of(name: str) -> list[dict[str, Any]]:
    """The defaults of every router, and settings that make its compute differ from them."""
    more: dict[str, list[dict[str, Any]]] = {
        "softmax_topk": [{"capacity_factor": 0.5}, {"capacity_factor": 1.0, "drop_policy": "position"}],
        "top_p": [{"top_p": 0.7, "k_max": 3}],
        "remoe": [{"k_max": 2}],
        "moe_plus_plus": [{"capacity_factor": 0.8}],
        "null_experts": [{"num_null_experts": 8}, {"null_output": "copy", "balance": "proportional"}],
        "sigmoid_topk": [{"balance": "none", "weights_on": "input"}],
        "expert_threshold": [{"k_max": 2}],
        "expert_choice": [{"capacity_factor": 0.5}],
        "mixture_of_depths": [{"capacity": 0.5}],
        "token_rounding": [{"tile": 2, "rounding": "up"}],
        "gshard": [{"capacity_factor": 0.5}],
    }
    return [{}, *more.get(name, [])]


ROUTER_OPTIONS = [{"name": name, **options} for name in names() for options in options_of(name)]


def label(router: dict[str, Any]) -> str:
    return "-".join([router["name"], *(f"{key}={value}" for key, value in router.items() if key != "name")])


@pytest.mark.parametrize("router", ROUTER_OPTIONS, ids=label)
@pytest.mark.parametrize("micro", [B, 1])
def test_what_is_counted_as_served_is_what_was_executed(router: dict[str, Any], micro: int) -> None:
    _, served, executed = step(config(router), micro=micro)
    assert torch.equal(served, executed)


def test_a_strangers_router_is_counted_by_its_records_alone() -> None:
    """It declares nothing, repeats experts and gives weights of 0: a row that is computed is a row that costs."""

    def move_in(model: Transformer) -> None:
        for block in blocks(model):
            block.router = Stranger()

    _, served, executed = step(config({"name": "softmax_topk"}), before=move_in)
    assert torch.equal(served, executed)
    ids = batch().input_ids
    assert int(served.sum()) == 2 * int((ids % 4).sum())  # two layers; id mod 4 experts a token


@pytest.mark.parametrize("router", ROUTER_OPTIONS, ids=label)
def test_forward_flops_are_those_of_the_matrix_products(router: dict[str, Any]) -> None:
    """Router, shared expert and the rows served of one layer, against what torch counts as it runs."""
    model = build_model(config(router), REGISTRY, seed=1).train()
    first, second = blocks(model)
    info = make_info(B, S, V, training=True)
    x = torch.randn(B * S, D, generator=torch.Generator().manual_seed(5))
    info = replace(info, previous=first(x, info)[1].routing)  # what a router that builds on the layer below multiplies
    with FlopCounterMode(display=False) as counter:
        _, record = second(x, info)
    beside = (second.router, second.shared_expert)
    weights = sum(p.numel() for part in beside for p in part.parameters() if p.ndim > 1)  # type: ignore[union-attr]
    assert counter.get_total_flops() == 2 * B * S * weights + 6 * D * F * int(record.counts.sum())
    attention = 2 * D * D + 2 * D * (D // 2)  # q and o; k and v of half the heads
    costs = served_costs(model, S)
    token = 3 * (2 * (2 * (attention + weights)) + 2 * (2 * S * D) + 2 * V * D)
    rows = torch.cat([torch.zeros(E, dtype=torch.int64), record.counts]).tolist()
    assert costs.flops(7, costs.weights(rows)) == 7 * token + 18 * D * F * sum(rows)


def test_training_flops_are_three_times_the_forward_ones() -> None:
    """Forward and backward of one layer as torch counts them."""
    model = build_model(config({"name": "softmax_topk"}), REGISTRY, seed=1).train()
    block = blocks(model)[0]
    x = torch.randn(B * S, D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y, record = block(x, make_info(B, S, V, training=True))
        y.square().sum().backward()
    beside = E * D + 3 * 20 * D + D
    assert counter.get_total_flops() == 3 * (2 * B * S * beside + 6 * D * F * int(record.counts.sum()))


def test_each_expert_costs_its_own_width_in_layers_of_their_own() -> None:
    """A dense layer, a heterogeneous one with a router that drops, and a small plain one."""
    heterogeneous = {"name": "heterogeneous", "widths": [4, 12], "num_experts": 6, "num_experts_per_tok": 2}
    model_config = config(
        {"name": "softmax_topk", "capacity_factor": 0.75},
        layers=3,
        layout={
            "name": "first_dense", "first_k_dense_replace": 1, "num_experts": E, "num_experts_per_tok": 2,
            "moe_intermediate_size": F,
        },
        patterns={"1": {"layout": heterogeneous}, "2": {"router": {"name": "mixture_of_depths", "capacity": 0.25}}},
    )  # fmt: skip
    model, served, executed = step(model_config)
    assert torch.equal(served, executed)
    assert len(served) == 6 + E
    costs = served_costs(model, S)
    widths = [4, 12] * 3 + [F] * E
    assert costs.expert_weights == tuple(3 * D * width for width in widths)
    progress = Progress(costs, flops_per_token(model, S))
    progress.advance(B * S, served, 0.5)
    by_hand = sum(18 * D * width * rows for width, rows in zip(widths, executed.tolist(), strict=True))
    assert progress.flops() == B * S * costs.token_flops + by_hand
    assert executed[:6].sum() <= 0.75 * 2 * B * S + 6  # dropped tokens cost nothing
    assert int(executed[6:].sum()) == B * 6 * 2  # a quarter of 24 positions, two experts


@pytest.mark.parametrize("name", ["null_experts", "moe_plus_plus", "top_p", "expert_choice"])
def test_what_is_computed_twice_is_counted_once(name: str) -> None:
    _, plain, _ = step(config({"name": name}))
    _, chunked, executed = step(config({"name": name}, expert_chunk=7))
    assert torch.equal(chunked, plain)
    assert torch.equal(executed, 2 * plain)  # each chunk again in the backward pass
    _, checkpointed, executed = step(config({"name": name}), before=apply_activation_checkpointing)
    assert torch.equal(checkpointed, plain)
    assert torch.equal(executed, 2 * plain)


def test_the_routing_pass_of_a_loss_is_no_model_flop() -> None:
    """A loss that needs the whole batch's counts makes every micro-batch run forward twice."""
    loss = [{"name": "load_balance", "scope": "global"}]
    _, served, executed = step(config({"name": "softmax_topk"}, balance_losses=loss), micro=1)
    assert torch.equal(executed, 2 * served)
    assert int(served.sum()) == 2 * B * S * K


def test_padding_costs_nothing() -> None:
    """Rows of padding are executed and not counted: they are the batch's, not the model's."""
    mask = torch.arange(S)[None, :] < torch.tensor([24, 20, 9, 1])[:, None]
    for router in ({"name": "softmax_topk"}, {"name": "null_experts"}, {"name": "expert_choice"}):
        _, served, executed = step(config(router), mask=mask)
        assert bool((served <= executed).all())
        if router["name"] == "softmax_topk":
            assert int(served.sum()) == 2 * K * int(mask.sum())
            assert int(executed.sum()) == 2 * K * B * S


def test_a_dense_model_serves_nothing_and_costs_what_it_declares() -> None:
    model_config = ModelConfig(V, D, 32, 2, 2, 1)
    model = build_model(model_config, REGISTRY, seed=1)
    settings = StepSettings(B, 0.0, 0, Precision(torch.device("cpu"), torch.float32))
    result = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [], batch(), 0, settings)
    assert result.served is None
    progress = Progress(served_costs(model, S), flops_per_token(model, S))
    progress.advance(B * S, result.served, 1.0)
    assert progress.flops() == progress.flops_declared() == B * S * flops_per_token(model, S)


@pytest.mark.parametrize("router", ROUTER_OPTIONS, ids=label)
def test_routers_declare_what_they_serve_when_balanced(router: dict[str, Any]) -> None:
    """Orthogonal rows of one length and Gaussian tokens: no choice is likelier than another, and tokens are apart.

    Tolerance: five standard deviations of a mean over T tokens, that of a token at most K / 2; counts rounded up in a
    sequence, to a tile, or by a capacity; and the sampling noise of the loads under capacities, sqrt(E K / (2 pi T)) in
    all (E experts, each short by sqrt(m / (2 pi)) of its mean load m = K T / E). `moe_plus_plus` declares the load that
    its balance loss leads to, so that is enforced by its capacities here. A router whose training decides is held to
    the bounds it names.
    """
    experts, hidden, length, sequences = 16, 64, 256, 32
    options = {"capacity_factor": 1.0, **router} if router["name"] == "moe_plus_plus" else router
    context = moelab.MoEContext(
        hidden, experts, 1 if router["name"] in ("switch", "base") else 4, F, 32, layer_id=0, num_hidden_layers=1,
        vocab_size=4096, allow_noncausal=True,
    )  # fmt: skip
    try:
        built: Any = REGISTRY.build(ROUTERS, options, context, "router")
    except ConfigError:
        context = replace(context, num_experts_per_tok=2)  # gshard
        built = REGISTRY.build(ROUTERS, options, context, "router")
    stream = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in built.parameters():
            nn.init.zeros_(parameter)
        if hasattr(built, "weight"):
            rows = torch.linalg.qr(torch.randn(hidden, hidden, generator=stream)).Q[: len(built.weight)]
            built.weight.copy_(rows)
    tokens, top_k = sequences * length, context.num_experts_per_tok
    x = torch.randn(tokens, hidden, generator=stream)
    info = make_info(sequences, length, 4096, training=True)
    served = int(built.train()(x, info).counts().sum()) / tokens
    declared = getattr(built, "expected_assignments", None) or ExpectedAssignments(top_k, "num_experts_per_tok")
    if not declared.settled:
        limits = {"remoe": (0, experts), "top_p": (1, declared.per_token), "gshard": (1, declared.per_token)}
        low, high = limits[router["name"]]
        assert low <= served <= high
        return
    noise = 5 * (top_k / 2) / tokens**0.5 + (experts * top_k / (6.28 * tokens)) ** 0.5
    tile = router.get("tile", 128 if router["name"] == "token_rounding" else 0)
    rounded = {"expert_choice": experts, "mixture_of_depths": top_k}.get(router["name"], 0)  # up, in each sequence
    rounding = rounded / length + (experts * tile + len(getattr(built, "weight", ()))) / tokens
    assert served == pytest.approx(declared.per_token, abs=noise + rounding)


def test_an_undecided_gshard_serves_what_it_declares() -> None:
    """Equal logits: w2 is a half and the second expert always serves; unnormalised, w2 is 1 / E."""
    for normalised, expected in ((True, 2.0), (False, 1 + 2 / E)):
        context = moelab.MoEContext(D, E, 2, F, 32, layer_id=0, num_hidden_layers=1, vocab_size=V)
        built: Any = REGISTRY.build(ROUTERS, {"name": "gshard", "norm_topk_prob": normalised}, context, "router")
        nn.init.zeros_(built.weight)
        assert built.expected_assignments.per_token == pytest.approx(expected)
        routing = built.train()(torch.ones(4096, D), make_info(16, 256, V, training=True))
        served = int(routing.counts().sum()) / 4096
        assert served == pytest.approx(expected, abs=5 * 0.5 / 64)  # five deviations of a coin's mean


def test_a_top_p_router_without_a_preference_serves_what_it_declares() -> None:
    for top_p, expected in ((0.4, 4), (0.5, 4), (0.51, 5), (1.0, 8)):
        context = moelab.MoEContext(D, E, 2, F, 32, layer_id=0, num_hidden_layers=1, vocab_size=V)
        built: Any = REGISTRY.build(ROUTERS, {"name": "top_p", "top_p": top_p}, context, "router")
        nn.init.zeros_(built.weight)
        assert built.expected_assignments.per_token == expected
        assert int(built(torch.ones(10, D), make_info(1, 10, V, training=True)).counts().sum()) == 10 * expected
