"""Who set what: told behind each value, and no other value than without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.config.load import load_config, merge_layers, read_layers
from moelab.config.provenance import annotated, origins
from moelab.config.run import RunConfig
from moelab.config.stored import to_yaml
from moelab.config.text import read_tree, write_tree

OVER = ["optimizer.lr=2e-3", "evaluation.prompts=['# a', 'b']", "model.moe.balance_losses.0.weight=0.5"]


@pytest.mark.parametrize(
    "change", [[], OVER, ["model.moe=null", "name='a # b'"], ["data.source={name: text, paths: []}"]]
)
def test_comments_change_nothing_of_what_is_read(root: Path, change: list[str]) -> None:
    arguments = [str(root / "configs/train/tiny_moe.yaml"), *change]
    layers = read_layers(arguments)
    for text in (to_yaml(load_config(arguments, RunConfig).config), write_tree(merge_layers(layers, RunConfig))):
        assert read_tree(annotated(text, origins(layers, RunConfig)), "x") == read_tree(text, "x")


def test_a_value_names_the_last_who_set_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "base: train/tiny_moe\nmodel: {moe: {router: {name: hash}}}\ntrain: {threads: null}"
    )
    layers = read_layers(["mine.yaml", *OVER, "model.moe.layout.name=uniform"])
    told = origins(layers, RunConfig)
    assert told["optimizer", "lr"] == "optimizer.lr=2e-3"
    assert told["model", "moe", "router", "name"] == "mine.yaml"
    assert told["train", "threads"] == "mine.yaml"
    assert told["train", "steps"].endswith("train/tiny_moe.yaml")
    assert told["model", "moe", "balance_losses", "0", "weight"] == OVER[2]
    assert told["model", "moe", "balance_losses", "0", "name"].endswith("train/tiny_moe.yaml")
    assert told["model", "moe", "layout", "num_experts"].endswith("train/tiny_moe.yaml")  # the same part: not replaced
    assert ("train", "dtype") not in told
    # The part was replaced whole: nobody set an option of the new one.
    assert not [path for path in told if path[:3] == ("model", "moe", "router") and path[3] != "name"]
