"""`moelab new` writes the template's part of one kind under another name, and overwrites nothing."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.hookspecs import EXTENSION_POINTS
from moelab_tools.cli import run
from moelab_tools.new_package import kinds, new_package

KINDS = sorted(kinds())


def test_every_kind_that_the_kit_checks_has_a_template() -> None:
    assert {point.kind for point in kinds().values()} == {point.kind for point in EXTENSION_POINTS if point.check}


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_has_its_own_part_and_no_trace_of_another(kind: str, tmp_path: Path) -> None:
    files = new_package(kind, "sharp_thing", tmp_path).files()
    data = {"data_source.csv"} if kind == "data_source" else set()
    assert files.keys() == data | {
        "README.md", "pyproject.toml", f"{kind}.yaml", "sharp_thing/__init__.py", f"sharp_thing/{kind}.py",
        f"tests/test_{kind}.py",
    }  # fmt: skip
    for name, text in files.items():
        assert "my_" not in text, name
        assert "MyPlugin" not in text, name
        for other in set(KINDS) - {kind}:
            assert f"{other}.py" not in text.replace(f"{kind}.py", ""), name
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["name"] == "sharp-thing"
    assert project["entry-points"]["moelab"] == {kind: f"sharp_thing.{kind}"}
    assert 'component("sharp_thing", ' in files[f"sharp_thing/{kind}.py"]
    for name, text in files.items():
        if name.endswith(".py"):
            assert ast.get_docstring(ast.parse(text)), name


@pytest.mark.parametrize("said", ["layout", "expert-layouts", "Expert Layout"])
def test_a_kind_may_be_said_in_short(said: str, tmp_path: Path) -> None:
    assert new_package(said, "sharp_thing", tmp_path).kind == "expert_layout"
    assert new_package("balance-losses", "sharp_thing", tmp_path).kind == "balance_loss"


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("rooter", "sharp_thing", "no template for 'rooter'.*did you mean 'router'"),
        ("router", "Sharp-Thing", "can't name a module"),
        ("router", "class", "can't name a module"),
        ("router", "json", "there is a module 'json' already"),
        ("router", "moelab", "there is a module 'moelab' already"),
        ("router", "softmax_topk", "there is a router 'softmax_topk' already, of moelab_plugins"),
    ],
)
def test_what_can_not_be_is_refused(kind: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        new_package(kind, name, tmp_path)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new", "router", "sharp_thing", "--in", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"written: {tmp_path / 'sharp_thing'}" in told
    (tmp_path / "sharp_thing" / "README.md").write_text("mine")
    assert run(["new", "observer", "sharp_thing", "--in", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "sharp_thing" / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["sharp_thing"]


def test_a_folder_that_came_in_between_is_kept(tmp_path: Path) -> None:
    package = new_package("router", "sharp_thing", tmp_path)
    (tmp_path / "sharp_thing").mkdir()
    (tmp_path / "sharp_thing" / "mine").touch()
    with pytest.raises(ConfigError, match="can't be written"):
        package.write()
    assert [path.name for path in tmp_path.rglob("*")] == ["sharp_thing", "mine"]
