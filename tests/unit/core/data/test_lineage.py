"""How weights were made: what changes the recipe, what is only a seed, and that it travels with them."""

from __future__ import annotations

import json
from dataclasses import asdict, field, replace
from pathlib import Path

import pytest

from later_keys import later
from moelab.across_versions import as_ever, as_today
from moelab.components import came_later
from moelab.config.run import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainConfig
from moelab.config.stored import read_stored_tree
from moelab.data.lineage import LINEAGE, Lineage, carried_lineage, converted, lineage_of, trained
from moelab.errors import CheckpointError
from moelab.registry import Registry
from moelab_plugins.routers.softmax_topk import SoftmaxTopKOptions


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(run_dir="runs/a")


def test_seeds_places_and_watching_change_no_recipe(config: RunConfig) -> None:
    first = trained(asdict(config), None)
    other = replace(config, seed=3, run_dir="runs/b", name="b", evaluation=EvaluationConfig(every=7))
    assert trained(asdict(other), None).recipe == first.recipe
    assert first.stages == (("training", "seed 0"),)
    assert trained(asdict(other), None).stages == (("training", "seed 3"),)
    ordered = replace(config, data=DataConfig(order_seed=5))
    assert trained(asdict(ordered), None) == Lineage(first.recipe, (("training", "seed 0, order 5"),))


def test_what_changes_the_weights_changes_the_recipe(config: RunConfig) -> None:
    recipes = {
        trained(asdict(one), None).recipe
        for one in (
            config,
            replace(config, optimizer=OptimizerConfig(lr=0.5)),
            replace(config, data=DataConfig(seed=1)),
            replace(config, train=replace(config.train, steps=7)),
        )
    }
    assert len(recipes) == 4
    assert trained(asdict(config), Lineage("x")).recipe != trained(asdict(config), Lineage("y")).recipe


def kept_recipe() -> str:
    """Of a run that was stored before any key that is given here."""
    kept = Path(__file__).parents[2] / "tools/sweep/kept_run/config.yaml"
    registry = Registry(entry_points=False)
    today = as_today(read_stored_tree(kept), RunConfig, registry)
    return trained(as_ever(today, RunConfig, registry), None).recipe


def test_a_key_that_came_later_changes_no_recipe_of_weights_from_before_it() -> None:
    """A run's new key that is not free says with `came_later` what was so before."""
    assert kept_recipe() == "fbccb1276246a6bdf625de77b7aae7c2"


def test_neither_does_an_option_that_came_later_whatever_its_default_becomes() -> None:
    before = kept_recipe()
    with later(SoftmaxTopKOptions, "later_option", "int", field(default=3, metadata=came_later(3))):
        assert kept_recipe() == before
    with later(TrainConfig, "later", "int", field(default=3, metadata=came_later(3))):
        assert kept_recipe() == before
    with later(SoftmaxTopKOptions, "later_option", "int", field(default=4, metadata=came_later(3))):
        assert kept_recipe() != before, "this is what it was before no more"
    with later(SoftmaxTopKOptions, "later_option", "int", 3):
        assert kept_recipe() != before, "nothing says what was so before"


def test_a_conversion_keeps_the_seeds_of_its_sources_apart_from_its_own() -> None:
    sources = [Lineage("dense", (("training", f"seed {seed}"),)) for seed in (0, 1)]
    first, second = (converted({"recipe": "drop"}, 4, [source]) for source in sources)
    assert first.recipe == second.recipe
    assert first.stages == (("training", "seed 0"), ("conversion", "seed 4"))
    assert converted({"recipe": "copy"}, 4, sources[:1]).recipe != first.recipe
    assert converted({"recipe": "drop"}, 4, [Lineage("other")]).recipe != first.recipe


def test_it_is_read_back_and_carried(tmp_path: Path, config: RunConfig) -> None:
    made = trained(asdict(config), Lineage("dense", (("training", "seed 1"),)))
    (tmp_path / LINEAGE).write_bytes(made.to_bytes())
    assert lineage_of(tmp_path, "here") == made
    assert carried_lineage(tmp_path) == {LINEAGE: made.to_bytes()}


def test_weights_that_say_nothing_are_their_own_recipe(tmp_path: Path) -> None:
    assert lineage_of(tmp_path, "Qwen2-7B") == Lineage("the weights Qwen2-7B")
    assert carried_lineage(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format_version": 1}',
        '{"format_version": 1, "recipe": "a", "stages": [1]}',
        '{"format_version": 99, "recipe": "a", "stages": []}',
    ],
)
def test_a_broken_file_is_named_with_the_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / LINEAGE).write_text(content)
    with pytest.raises(CheckpointError, match=LINEAGE):
        lineage_of(tmp_path, "here")


def test_the_file_is_plain_json(config: RunConfig) -> None:
    found = json.loads(trained(asdict(config), None).to_bytes())
    assert sorted(found) == ["format_version", "recipe", "stages"]
