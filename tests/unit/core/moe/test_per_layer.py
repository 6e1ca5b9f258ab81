"""Layer patterns, and the parts that each layer gets."""

from __future__ import annotations

import pytest

from moelab import ConfigError
from moelab.config.model import MoEConfig
from moelab.moe.per_layer import layer_parts, match_layers


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("3", [3]),
        ("2-4", [2, 3, 4]),
        ("5-", [5, 6, 7]),
        ("0-7/3", [0, 3, 6]),
        ("1-/2", [1, 3, 5, 7]),
        ("0, 6-7", [0, 6, 7]),
    ],
)
def test_a_pattern_names_its_layers(pattern: str, layers: list[int]) -> None:
    assert match_layers(pattern, 8, "here") == layers


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("x", "not a layer pattern"), ("-3", "not a layer pattern"), ("8", "0 .. 7"), ("4-2", "0 .. 7"), ("9-", "0 .. 7"),
     ("1,0-2", "layer 1 twice"), ("", "not a layer pattern")],
)  # fmt: skip
def test_a_pattern_that_names_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        match_layers(pattern, 8, "here")


def test_an_override_with_another_name_replaces_the_part_whole() -> None:
    moe = MoEConfig(
        router={"name": "softmax_topk", "norm_topk_prob": True}, layers={"2-": {"router": {"name": "hash"}}}
    )
    parts = layer_parts(moe, 4)
    assert [p.router for p in parts] == [{"name": "softmax_topk", "norm_topk_prob": True}] * 2 + [{"name": "hash"}] * 2
    assert parts[3].where("router") == 'model.moe.layers."2-".router'


def test_patterns_that_meet_are_refused() -> None:
    moe = MoEConfig(layers={"0-2": {"router": {"name": "hash"}}, "2-": {"router": {"name": "hash"}}})
    with pytest.raises(ConfigError, match='"2-": layer 2 is already matched by "0-2"'):
        layer_parts(moe, 4)
