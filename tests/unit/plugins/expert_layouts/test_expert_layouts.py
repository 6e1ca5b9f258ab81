"""Layouts by hand-computed counts, padded widths that stay zero, and the solver that matches a baseline."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from moelab import ConfigError, ExpertLayout, LayoutContext, Registry
from moelab.builder import build_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.hookspecs import EXPERT_LAYOUTS
from moelab.nn.count import count_parameters
from moelab.planning.match import match_layout, measure_model
from moelab_tools.cli import run

REGISTRY = Registry(entry_points=False)


def layers(name: str, **options: Any) -> list[ExpertLayout | None]:
    contexts = [LayoutContext(16, 96, layer, 6) for layer in range(6)]
    return [REGISTRY.build(EXPERT_LAYOUTS, {"name": name, **options}, c, "model.moe.layout") for c in contexts]


def test_granularity_changes_neither_total_nor_active_width() -> None:
    for granularity in (1, 4, 8):
        layout = layers("granular", granularity=granularity, expansion=8, active=2)[0]
        assert layout == ExpertLayout(8 * granularity, 2 * granularity, 96 // granularity)
        assert (layout.total_width, layout.active_width) == (768, 192)


def test_which_layers_are_sparse() -> None:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    sparse = {
        "first_dense": [False] + [True] * 5,
        "every_n": [False, True] * 3,
        "uniform": [True] * 6,
    }
    for name, expected in sparse.items():
        assert [layout is not None for layout in layers(name, **sizes)] == expected


def test_a_pyramid_grows_in_multiples() -> None:
    found = layers("pyramid", first_num_experts=8, last_num_experts=32, num_experts_per_tok=2,
                   moe_intermediate_size=12, multiple_of=8)  # fmt: skip
    assert [layout.num_experts for layout in found if layout] == [8, 16, 16, 24, 24, 32]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("granular", {"granularity": 7}, "7 does not divide model.intermediate_size 96; near it 6, 8, 12 would"),
        ("first_dense", {"first_k_dense_replace": 6}, "leaves none of 6 layers with experts"),
        ("per_layer", {"num_experts": [4, 4]}, "2 numbers for 6 layers; give one, or one each"),
        ("uniform", {"mlp_only_layers": [9]}, r"mlp_only_layers: 9 is none of the layers 0 \.\. 5"),
        ("heterogeneous", {"widths": [4, 8, 4]}, "must be a multiple of the 3 widths"),
    ],
)
def test_an_impossible_layout_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if name == "per_layer":
        sizes = {key: [value] for key, value in sizes.items()}
    sizes = {} if name == "granular" else sizes
    if name == "heterogeneous":
        del sizes["moe_intermediate_size"]
    with pytest.raises(ConfigError, match=message):
        layers(name, **(sizes | options))


def model(layout: dict[str, Any] | None) -> ModelConfig:
    moe = None if layout is None else MoEConfig(layout=layout)
    return ModelConfig(32, 16, 96, 2, 2, 1, moe=moe)


def test_narrow_experts_stay_narrow_through_training() -> None:
    config = model({"name": "heterogeneous", "widths": [4, 12], "num_experts": 4, "num_experts_per_tok": 2})
    built = build_model(config, REGISTRY)
    bank = built.layers[0].mlp.experts
    optimizer = torch.optim.AdamW(built.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ids = torch.randint(0, 32, (4, 8))
        built(ids, targets=ids).token_loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for expert in (0, 2):
        assert not bank.down[expert, 4:].any()
        assert not bank.gate_up[expert].view(2, 12, 16)[:, 4:].any()
        assert bank.down[expert, :4].all()
    uniform = build_model(
        model({"name": "uniform", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8})
    )
    assert count_parameters(built) == count_parameters(uniform)


@pytest.mark.parametrize("measure", ["total", "active", "flops"])
def test_the_solver_recovers_a_width(measure: str) -> None:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    start = layout | {"moe_intermediate_size": 16}
    found = match_layout(model(start), model(layout), REGISTRY, measure=measure)
    assert (found.value, found.error) == (24, 0.0)


def test_the_solver_matches_a_dense_model_as_near_as_it_can() -> None:
    layout = {"name": "uniform", "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 8}
    found = match_layout(model(layout), model(None), REGISTRY, measure="active")
    neighbours = [
        abs(
            measure_model(model(layout | {"moe_intermediate_size": found.value + d}), "active", 1, REGISTRY)
            - found.wanted
        )
        for d in (-1, 0, 1)
    ]
    assert min(neighbours) == neighbours[1]


def test_explain_prints_every_layer_with_parts_owners_and_costs(root: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(root / "configs/train/tiny_moe.yaml")
    assert run(["explain", config, "--json", "model.moe.layers.1.router.name=hash", "model.moe.balance_losses=[]"]) == 0
    table = json.loads(capsys.readouterr().out)
    first, second = table["layers"]
    assert first["parts"]["router"]["owner"] == "moelab_plugins.routers.softmax_topk"
    assert second["parts"]["router"] == {
        "name": "hash", "owner": "moelab_plugins.routers.hash", "pattern": "1",
        "options": {"seed": 0, "frequencies": None},
    }  # fmt: skip
    assert first["parameters"] - second["parameters"] == 8 * 64  # the router's matrix
    layers_total = sum(layer["parameters"] for layer in table["layers"])
    assert layers_total + table["embedding_parameters"] + 64 == table["parameters"]


def test_explain_tells_what_routers_declare_and_matches_by_it(root: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(root / "configs/train/tiny_moe.yaml")
    half = "model.moe.router={name: null_experts, num_null_experts: 8}"
    assert run(["explain", config, half, "--json", "--match", config]) == 0
    table = json.loads(capsys.readouterr().out)
    expected = [layer["expected_assignments"] for layer in table["layers"]]
    assert [(one["per_token"], one["settled"]) for one in expected] == [(1.0, True)] * 2
    extra = 8 * 64  # the rows of eight null experts, for which 2.67 neurons less are active
    assert table["match"]["value"] == round(128 - extra / (3 * 64))
    assert run(["explain", config, half, "--match", config]) == 0
    out = capsys.readouterr().out
    assert "expects 1 experts a token in training (K E / (E + num_null_experts), at an even load of all choices)" in out
    assert "active and FLOP are as the routers declare; a run counts what it served\n" in out
    assert out.rstrip().endswith(", as the routers declare")


def test_explain_names_a_wrong_key(root: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(root / "configs/train/tiny_moe.yaml")
    assert run(["explain", config, "model.moe.router.norm_topk=true"]) == 2
    assert "did you mean 'norm_topk_prob'" in capsys.readouterr().err


def test_plugins_lists_owner_options_and_doc(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "--json", "entry_points=false"]) == 0
    entries = {(e["key"], e["name"]): e for e in json.loads(capsys.readouterr().out)}
    entry = entries["model.moe.router", "switch"]
    assert entry["owner"] == "moelab_plugins.routers.switch"
    assert entry["summary"] == "The single best expert, weighted by its probability."
    jitter = next(o for o in entry["options"] if o["name"] == "input_jitter")
    assert (jitter["type"], jitter["default"]) == ("float", "0.01")
    assert jitter["comment"].startswith("in training x is multiplied")
