"""The config after a surgery says the layers that were asked for, and nothing else."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from moelab.errors import ConfigError
from moelab.layouts import build_layouts
from moelab.moe.layout import ExpertLayout
from moelab.surgery.layout_change import with_layouts
from operated_models import LAYOUT, REGISTRY, config_of

ROUTER = {"name": "softmax_topk"}
SMALL, LARGE = ExpertLayout(4, 2, 8), ExpertLayout(12, 4, 4)


def test_a_layout_with_the_three_numbers_keeps_its_name_where_they_say_it_all() -> None:
    config = config_of(ROUTER, {**LAYOUT, "mlp_only_layers": [1]}, layers=3)
    changed = with_layouts(config, {0: LARGE, 2: LARGE}, REGISTRY)
    assert build_layouts(changed, REGISTRY) == {0: LARGE, 2: LARGE}
    assert (changed.moe.layout["name"], changed.moe.layout["mlp_only_layers"]) == ("uniform", [1])
    assert build_layouts(config, REGISTRY) == dict.fromkeys((0, 2), ExpertLayout(6, 2, 8))  # the first is as it was
    rest = [asdict(one) for one in (config, changed)]
    for one in rest:
        del one["moe"]["layout"]
    assert rest[0] == rest[1]


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        {"name": "granular", "granularity": 4, "expansion": 2, "active": 1},
        {"name": "pyramid", "first_num_experts": 4, "last_num_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 8},
    ],
    ids=lambda layout: layout["name"],
)  # fmt: skip
def test_elsewhere_every_layer_is_written_out(layout: dict[str, object]) -> None:
    wanted = {0: SMALL, 1: LARGE, 2: SMALL}
    changed = with_layouts(config_of(ROUTER, layout, layers=3), wanted, REGISTRY)
    assert build_layouts(changed, REGISTRY) == wanted
    assert changed.moe.layout["name"] == "per_layer"


def test_layouts_of_single_layers_give_way_and_their_other_parts_stay() -> None:
    config = config_of(ROUTER, layers=3)
    config.moe.layers = {
        "0": {"layout": {"num_experts": 8}},
        "1-2": {"layout": {"num_experts": 4}, "router": {"norm_topk_prob": True}},
    }
    wanted = {0: SMALL, 1: LARGE, 2: SMALL}
    changed = with_layouts(config, wanted, REGISTRY)
    assert build_layouts(changed, REGISTRY) == wanted
    assert changed.moe.layers == {"1-2": {"router": {"norm_topk_prob": True}}}


def test_what_no_layout_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layout says what the layers are"):
        with_layouts(config_of(ROUTER), {0: SMALL, 1: ExpertLayout(2, 1, 8, (4, 8))}, REGISTRY)
