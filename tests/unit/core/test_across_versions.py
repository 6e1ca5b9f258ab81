"""What a config of an earlier version lacks: filled in where its schema keeps a part, and nowhere else."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from later_keys import later
from moelab.across_versions import as_ever, as_today
from moelab.components import came_later
from moelab.config.run import RunConfig
from moelab.registry import Registry
from moelab_plugins.balance_losses.load_balance import LoadBalanceOptions
from moelab_plugins.routers.softmax_topk import SoftmaxTopKOptions
from moelab_plugins.text_filters.length import LengthOptions

REGISTRY = Registry(entry_points=False)


def _today(**tree: Any) -> dict[str, Any]:
    return as_today({"run_dir": "runs/a", **tree}, RunConfig, REGISTRY)


def test_each_part_is_filled_in_though_another_is_gone() -> None:
    parts = {
        "router": {"name": "softmax_topk"},
        "layout": {"name": "of_nobody", "size": 3},
        "balance_losses": [{"name": "load_balance", "weight": 0.1}, {"name": "of_nobody"}],
    }
    with (
        later(SoftmaxTopKOptions, "later_option", "tuple", (3,)),
        later(LoadBalanceOptions, "later_option", "int", 5),
    ):
        moe = _today(model={"moe": parts})["model"]["moe"]
    assert moe["router"]["later_option"] == [3], "as it is stored"
    assert moe["balance_losses"][0]["later_option"] == 5
    assert moe["balance_losses"][0]["weight"] == 0.1
    assert moe["layout"] == {"name": "of_nobody", "size": 3}
    assert moe["balance_losses"][1] == {"name": "of_nobody"}
    assert parts["router"] == {"name": "softmax_topk"}, "what was given stays as it was"


def test_a_stage_of_a_run_that_has_a_text_filters_name_is_no_filter() -> None:
    with later(LengthOptions, "later_option", "int", 3):
        (stage,) = _today(stages=[{"name": "length", "mixer": {"name": "balanced"}}])["stages"]
    assert "later_option" not in stage
    assert stage["mixer"]["name"] == "balanced"
    assert len(stage["mixer"]) > 1, "a stage's mixer is one"


def test_what_came_later_is_left_out_at_what_was_so_before_alone() -> None:
    came = field(default=3, metadata=came_later(3))
    with later(SoftmaxTopKOptions, "later_option", "int", came):
        tree = _today(model={"moe": {"router": {"name": "softmax_topk"}}})
        assert "later_option" not in as_ever(tree, RunConfig, REGISTRY)["model"]["moe"]["router"]
        assert tree["model"]["moe"]["router"]["later_option"] == 3, "of a copy"
        tree["model"]["moe"]["router"]["later_option"] = 4
        assert as_ever(tree, RunConfig, REGISTRY)["model"]["moe"]["router"]["later_option"] == 4
    tree = _today(optimizer={"algorithm": {"name": "adamw"}}, stages=[])
    found = as_ever(tree, RunConfig, REGISTRY)
    assert "algorithm" not in found["optimizer"]
    assert "stages" not in found
    assert "autotune" not in found["train"]
