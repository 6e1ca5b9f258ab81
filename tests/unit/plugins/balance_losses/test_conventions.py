"""Each program's load-balance loss, retyped from its source, against ours times the converted coefficient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelab import BalanceContext, BalanceLossContext, ConfigError, ExpertLayout, LayerRecord, Registry, Routing
from moelab.builder import build_balance_losses
from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.hookspecs import BALANCE_LOSSES
from moelab.moe.coefficients import CONVENTIONS, convert_coefficient
from moelab.testing.tensors import make_info

REGISTRY = Registry(entry_points=False)
TOKENS = 96
ROOT = Path(__file__).resolve().parents[4]
SHAPES = [
    (8, 1, 3, 0.0),
    (8, 2, 3, 0.0),
    (64, 8, 4, 0.0),
    (64, 8, 4, 2.0),
    (8, 2, 3, 2.0),
    (16, 1, 2, 2.0),
    (32, 4, 5, 2),
]


def draw(experts: int, layers: int, skew: float, seed: int = 0) -> list[Tensor]:
    """Logits [T, E] of each layer in float64; with a skew, each layer favours experts of its own."""
    stream = torch.Generator().manual_seed(seed)
    shape, one = (TOKENS, experts), (1, experts)
    return [
        torch.randn(shape, generator=stream, dtype=torch.float64)
        + skew * torch.randn(one, generator=stream, dtype=torch.float64)
        for _ in range(layers)
    ]


def chosen(p: Tensor, top_k: int) -> Tensor:
    """[T, E] float64, one at each token's K best."""
    return torch.zeros_like(p).scatter_(1, p.topk(top_k).indices, 1.0)


def megatron(logits: list[Tensor], top_k: int) -> Tensor:
    """megatron/core/transformer/moe/moe_utils.py: switch_load_balancing_loss_func, layer by layer."""
    total = torch.zeros((), dtype=torch.float64)
    for p in (z.softmax(-1) for z in logits):
        tokens, experts = p.shape
        total = total + (p.sum(0) * chosen(p, top_k).sum(0)).sum() * experts / (tokens * tokens * top_k)
    return total


def megablocks(logits: list[Tensor], top_k: int) -> Tensor:
    """megablocks/layers/moe.py: batched_load_balancing_loss: one dot product over all layers, scaled once."""
    layers, (tokens, experts) = len(logits), logits[0].shape
    counts = torch.cat([chosen(z.softmax(-1), top_k).sum(0) for z in logits])
    means = torch.cat([z.softmax(-1).mean(0) for z in logits])
    return experts / (layers * tokens * top_k) * counts.dot(means)


def deepspeed(logits: list[Tensor], top_k: int) -> Tensor:
    """deepspeed/moe/sharded_moe.py: top1gating, top2gating (first choices) and topkgating (divided by k)."""
    total = torch.zeros((), dtype=torch.float64)
    for p in (z.softmax(-1) for z in logits):
        counted, parts = (1, 1) if top_k <= 2 else (top_k, top_k)
        total = total + (p.mean(0) * chosen(p, counted).mean(0)).mean() * p.shape[1] ** 2 / parts
    return total


def mesh(logits: list[Tensor], top_k: int) -> Tensor:
    """mesh_tensorflow/transformer/moe.py, first choices; transformer.py adds what the layers append to `losses`."""
    return torch.stack([(z.softmax(-1).mean(0) * chosen(z, 1).mean(0)).mean() * z.shape[1] ** 2 for z in logits]).sum()


def t5x(logits: list[Tensor], top_k: int) -> Tensor:
    """flaxformer's _load_balancing_loss, any of the K choices counting one; t5x means over layers."""
    return torch.stack(
        [(z.softmax(-1).mean(0) * chosen(z, top_k).mean(0)).mean() * z.shape[1] ** 2 for z in logits]
    ).mean()


def huggingface(logits: list[Tensor], top_k: int) -> Tensor:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    return torch.as_tensor(load_balancing_loss_func(tuple(logits), logits[0].shape[1], top_k))


PROGRAMS: dict[str, Callable[[list[Tensor], int], Tensor]] = {
    "megatron": megatron, "megablocks": megablocks, "deepspeed": deepspeed, "mesh": mesh, "t5x": t5x,
    "huggingface": huggingface,
}  # fmt: skip


def records_of(logits: Sequence[Tensor], top_k: int) -> list[LayerRecord]:
    info = make_info(2, TOKENS // 2, 4, training=True)
    records = []
    for layer, z in enumerate(logits):
        p = z.softmax(-1)
        weight, expert = p.topk(top_k)
        routing = Routing.from_topk(expert, weight, p.shape[1], scores=p, logits=z)
        records.append(LayerRecord(layer, routing, routing.counts(), info=info))
    return records


def ours(logits: Sequence[Tensor], top_k: int, **options: Any) -> float:
    """Coefficient times value of load_balance."""
    layouts = {i: ExpertLayout(logits[0].shape[1], top_k, 4) for i in range(len(logits))}
    options = {"name": "load_balance", "weight": 1.0, "scope": "micro", **options}
    loss = REGISTRY.build(BALANCE_LOSSES, options, BalanceLossContext(layouts), "losses.0")
    return loss.weight * float(loss(records_of(logits, top_k), BalanceContext(None)))


def test_every_convention_is_tried() -> None:
    assert set(PROGRAMS) | {"moelab"} == set(CONVENTIONS)


@pytest.mark.parametrize(("experts", "top_k", "layers", "skew"), SHAPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_coefficient_of_another_program_adds_what_it_adds_there(
    name: str, experts: int, top_k: int, layers: int, skew: float
) -> None:
    """To the fp32 of our loads, wherever the conversion says that it is exact."""
    logits = draw(experts, layers, skew)
    if name == "huggingface":  # it pools layers: exact where they agree
        logits = [logits[0]] * layers
    found, expected = ours(logits, top_k, convention=name), float(PROGRAMS[name](logits, top_k))
    counts_first_choices = (name == "deepspeed" and top_k == 2) or (name == "mesh" and top_k > 1)
    if counts_first_choices:
        assert found != pytest.approx(expected, rel=1e-4)  # as documented
    else:
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["mesh", "deepspeed"])
def test_first_choices_are_exact_where_the_router_shows_them(name: str) -> None:
    """As gshard does: counted at K = 1, of a router with two experts a token."""
    logits = draw(8, 3, 2.0)
    assert ours(logits, 1, convention=name) == pytest.approx(float(PROGRAMS[name](logits, 2)), rel=1e-6)


def test_pooling_hides_what_layers_do_apart() -> None:
    """transformers pools: layers that favour different experts look balanced to it, and cost less than ours."""
    logits = draw(64, 4, 2.0)
    assert ours(logits, 8, convention="huggingface") > 1.3 * float(huggingface(logits, 8))


@pytest.mark.parametrize(("convention", "recipe", "layers"), [
    ("mesh", "switch", 2), ("mesh", "gshard", 2), ("megatron", "deepseek_moe", 3), ("megatron", "deepseek_v3", 3),
])  # fmt: skip
def test_a_recipe_adds_its_loss_for_each_layer(convention: str, recipe: str, layers: int) -> None:
    """The coefficient of the mean over layers is the published one times the layers."""
    files = [str(ROOT / "configs/train/tiny_moe.yaml"), str(ROOT / f"configs/moe/{recipe}.yaml")]
    depth = {"switch": 4, "gshard": 4, "deepseek_moe": 4, "deepseek_v3": 6}[recipe]
    model = load_config([*files, f"model.num_hidden_layers={depth}"], RunConfig).config.model
    (loss,) = build_balance_losses(model, REGISTRY)
    assert model.moe is not None
    node = model.moe.balance_losses[0]
    assert node["convention"] == convention
    assert loss.weight_at(0) == pytest.approx(layers * node["weight"])


def test_layers_of_unequal_top_k_have_no_coefficient_that_counts_it() -> None:
    layouts = {0: ExpertLayout(8, 2, 4), 1: ExpertLayout(8, 1, 4)}
    for name in CONVENTIONS:
        node = {"name": "load_balance", "convention": name}
        if CONVENTIONS[name].times_top_k:
            with pytest.raises(ConfigError, match=rf"convention: {name} needs one num_experts_per_tok"):
                REGISTRY.build(BALANCE_LOSSES, node, BalanceLossContext(layouts), "losses.0")
        else:
            REGISTRY.build(BALANCE_LOSSES, node, BalanceLossContext(layouts), "losses.0")
    assert convert_coefficient(0.01, "t5x", "mesh", top_k=2, num_layers=4) == pytest.approx(0.005)
