"""`moelab config`: what is set, what is resolved, which keys there are, and the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moelab.config.keys import config_keys
from moelab.config.run import RunConfig
from moelab.config.scalars import settle
from moelab.config.text import read_tree
from moelab.hookspecs import EXTENSION_POINTS
from moelab.registry import Registry
from moelab_tools.cli import run
from moelab_tools.config_listing import plugin_names
from moelab_tools.config_schema import config_schema
from moelab_tools.key_page import page

OWN = """
from dataclasses import dataclass
import moelab
@dataclass
class Options:
    temperature: float = 1.0  # of the softmax; higher is flatter
@moelab.hookimpl
def moelab_routers():
    return [moelab.component("tempered", Options, lambda options, context: None)]
"""


def _told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["config", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def test_what_is_set_is_told_with_who_set_it_though_it_is_not_whole(capsys: pytest.CaptureFixture[str]) -> None:
    told = _told(capsys, "moe/switch", "train.steps=7")
    assert "steps: 7  # train.steps=7" in told
    assert "name: switch  # configs/moe/switch.yaml" in told or "name: switch  # moe/switch.yaml" in told
    assert "optimizer" not in told


def test_resolved_has_the_options_of_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    told = settle(read_tree(_told(capsys, "configs/train/tiny_moe.yaml", "--resolved"), "x"))
    assert set(told) == {key.path for key in config_keys(RunConfig) if "." not in key.path}
    assert told["model"]["moe"]["router"]["capacity_factor"] is None
    assert told["observers"][0]["flush_secs"] == 10
    assert run(["config", "configs/train/tiny_moe.yaml", "--resolved", "model.moe.router.nmae=hash"]) == 2
    assert "set by model.moe.router.nmae=hash" in capsys.readouterr().err


def test_an_upcycling_config_is_known_by_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    told = settle(read_tree(_told(capsys, "configs/upcycle/qwen2_57b_a14b.yaml", "source=x", "--resolved"), "x"))
    assert told["recipe"]["experts"]["reinit_fraction"] == 0.5
    assert told["recipe"]["shared"]["extra"] == "zero_down"


def test_keys_of_a_section_and_options_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _told(capsys, "--keys", "optimizer").splitlines()
    assert lines[3] == "optimizer.lr: float = 0.001  # the highest learning rate; `schedule` says when"
    parts = _told(capsys, "--keys", "model.moe.shared_expert")
    assert "  intermediate_size: int = required  # of each" in parts
    assert "gated  # One feed-forward network" in parts
    one = _told(capsys, "--keys", "model.moe.shared_expert.several")
    assert "num_experts: int = 2" in one
    assert "dense_residual  #" not in one
    of_all = _told(capsys, "--keys", "model.moe.router.norm_topk_prob")
    assert "norm_topk_prob: bool" in of_all
    assert "capacity_factor:" not in of_all
    every = _told(capsys, "--keys")
    assert "train.steps: int = required" in every
    assert "recipe.others" in every


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--keys", "optimiser"], "did you mean 'optimizer'"), (["--keys", "data.source.txt"], "did you mean 'text'"),
        (["--schema", "trian"], "must be train or upcycle or data or merge or critique"), ([], "name a config file"),
        (["--keys", "--resolved"], "one at a time"),
    ],
)  # fmt: skip
def test_what_can_not_be_told_is_a_mistake(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_keys_and_what_is_set_need_no_torch(root: Path) -> None:
    code = (
        "import sys; from moelab_tools.cli import run; assert run(['config', '--keys']) == 0; "
        "assert run(['config', 'train/tiny_moe']) == 0; assert 'torch' not in sys.modules"
    )
    outcome = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_the_page_of_all_keys_is_up_to_date(root: Path) -> None:
    found = (root / "docs/config_keys.md").read_text()
    assert found == page(), "run: python -m moelab_tools.key_page docs/config_keys.md"


def test_the_names_of_built_in_plugins_are_told_without_importing_them() -> None:
    registry = Registry(entry_points=False)
    for point in EXTENSION_POINTS:
        assert sorted(registry.components(point)) == sorted(plugin_names(point.key)), point.hook


def test_the_schema_knows_every_key_and_every_option() -> None:
    registry = Registry(entry_points=False)
    schema = config_schema(RunConfig, registry, "x")

    def at(path: str) -> Any:
        found: Any = schema
        for piece in path.split("."):
            found = found.get("anyOf", [found])[0]["properties"][piece]
        return found

    for key in config_keys(RunConfig):
        assert at(key.path)["description"] == key.doc
    for point in EXTENSION_POINTS[:5]:
        offered = {one["title"]: one["properties"] for one in schema["definitions"][point.key]["anyOf"]}
        for name, component in registry.components(point).items():
            assert {"name", *(f for f in component.options.__dataclass_fields__)} <= offered[name].keys()
    assert json.loads(json.dumps(schema)) == schema


def test_a_plugin_of_ones_own_is_in_keys_and_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_router_of_keys.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    told = _told(capsys, "--keys", "model.moe.router.tempered", "plugins=[my_router_of_keys]")
    assert "  temperature: float = 1.0  # of the softmax; higher is flatter" in told
    assert '"const": "tempered"' in _told(capsys, "--schema", "plugins=[my_router_of_keys]")
