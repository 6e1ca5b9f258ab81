"""What a config chose, in short: names, what single layers have, and the options that are not at their defaults."""

from __future__ import annotations

from typing import Any

from moelab.builder import resolve_model
from moelab.config.model import ModelConfig, MoEConfig
from moelab.config.stored import stored
from moelab.registry import Registry
from moelab.training.parts import components, own_options

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def resolved(**parts: Any) -> ModelConfig:
    moe = MoEConfig(**{"layout": {"name": "uniform", **SIZES}, **parts})
    config = ModelConfig(16, 8, 8, 4, 2, 2, moe=moe)
    resolve_model(config, Registry(entry_points=False))
    return config


def test_only_options_that_are_not_their_plugins_defaults_are_told() -> None:
    losses = [{"name": "load_balance", "weight": 0.02}, {"name": "router_z", "layers": "1-"}]
    config = resolved(router={"name": "softmax_topk", "norm_topk_prob": True, "n_group": 1}, balance_losses=losses)
    told = own_options(stored(config)["moe"], config.moe, Registry(entry_points=False))
    assert told["router"] == {"norm_topk_prob": True}  # n_group was written, at its default
    assert told["layout"] == SIZES  # required: there is no default
    assert told["balance_losses.0"]["weight"] == 0.02
    assert told["balance_losses.1"]["layers"] == "1-"
    assert "shared_expert" not in told
    assert "backend" not in told


def test_an_option_from_the_environment_is_told_as_it_was_written() -> None:
    config = resolved(router={"name": "softmax_topk", "routed_scaling_factor": 2.5})
    written = stored(config)["moe"]
    written["router"]["routed_scaling_factor"] = "${oc.env:SCALE}"
    told = own_options(written, config.moe, Registry(entry_points=False))
    assert told["router"] == {"routed_scaling_factor": "${oc.env:SCALE}"}


def test_single_layers_are_named_with_what_they_have_instead() -> None:
    layers = {"0": {"router": {"name": "hash", "seed": 3}}, "2-3": {"router": {"norm_topk_prob": True}}}
    moe = stored(resolved(layers=layers))["moe"]
    assert components(moe)["layers"] == "0: router hash(seed=3); 2-3: router norm_topk_prob=True"
    assert components(moe)["router"] == "softmax_topk"
    assert "layers" not in components(stored(resolved())["moe"])


def test_a_dense_model_has_neither() -> None:
    assert components(None) == {}
    assert own_options(None, None, Registry(entry_points=False)) == {}
