"""Plugins and data are found beside the file that names them and in the current folder, by every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.config.load import load_config
from moelab.config.run import RunConfig
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import DataContext
from moelab.errors import DataError
from moelab.paths import Places
from moelab_tools.cli import run

PLUGIN = """
from dataclasses import dataclass
import moelab

@dataclass
class Options:
    pass

def build(options, context):
    "Planted."

@moelab.hookimpl
def moelab_shared_experts():
    return [moelab.component({name!r}, Options, build)]
"""
# What each command asks of a config that names the plugin; train and sweep are stopped by the data, which come later.
COMMANDS = {
    "explain": ["explain", "CONFIG"],
    "plan": ["plan", "CONFIG"],
    "train": ["train", "CONFIG", "run_dir=run", "data.source={name: text, paths: [nowhere]}"],
    "sweep": ["sweep", "CONFIG", "seed=0,1", "--out", "swept", "--dry-run"],
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders `configs` and `here`, of which the latter is the current one."""
    for name in ("configs", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def plugin(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(PLUGIN.format(name=name))


@pytest.mark.parametrize("folder", ["configs", "here"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_plugin_is_found_beside_the_config_and_in_the_current_folder(
    command: str, folder: str, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"placed_{command}_{folder}"
    plugin(lab / folder, name)
    config = lab / "configs" / "mine.yaml"
    chosen = f"shared_expert: {{name: {name}}}"
    config.write_text(f"base: train/tiny_moe\nplugins: [{name}]\nmodel: {{moe: {{{chosen}}}}}\n")
    code = run([str(config) if word == "CONFIG" else word for word in COMMANDS[command]])
    told = capsys.readouterr()
    if command == "train":
        assert "no file or folder 'nowhere'" in told.err
    else:
        assert code == 0, told.err


def test_a_named_module_of_the_current_folder_is_listed(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin(lab / "here", "placed_list")
    assert run(["plugins", "plugins=[placed_list]", "--json"]) == 0
    assert "placed_list" in capsys.readouterr().out


def test_the_folder_of_the_file_in_whose_text_a_name_stands_comes_first(lab: Path) -> None:
    """A base's too; what was typed counts from where one stands; the other folders follow."""
    base, mine, here = lab / "bases", lab / "configs", lab / "here"
    base.mkdir()
    (base / "base.yaml").write_text("base: train/tiny_moe\ndata: {source: {name: text, paths: [texts]}}\n")
    (mine / "mine.yaml").write_text("base: ../bases/base.yaml\nplugins: [my_lab]\n")
    config = load_config([str(mine / "mine.yaml"), "train.init_from=x"], RunConfig).config
    assert config.places("data").of("texts")[0] == base.resolve()
    assert config.places("plugins").of("my_lab")[0] == mine.resolve()
    assert config.places("plugins").of("another")[-1] == here.resolve()
    typed = load_config([str(mine / "mine.yaml"), "plugins=[my_lab]"], RunConfig).config
    assert typed.places("plugins").of("my_lab")[0] == here.resolve()
    assert set(typed.places("plugins").of("my_lab")) > {base.resolve(), mine.resolve()}


def test_a_source_of_ones_own_finds_its_file_beside_the_second_config(lab: Path) -> None:
    """And tells that there are two, where there are."""
    (lab / "configs" / "first.yaml").write_text("seed: 1\n")
    (lab / "second").mkdir()
    (lab / "second" / "second.yaml").write_text("data: {source: {name: own, file: rows.csv}}\n")
    words = ["train/tiny_moe", str(lab / "configs" / "first.yaml"), str(lab / "second" / "second.yaml")]
    places = load_config(words, RunConfig).config.places("data")
    context = DataContext(ByteTokenizer(), places=places)
    for folder in ("here", "second"):
        (lab / folder / "rows.csv").write_text("x")
        assert context.find("rows.csv") == (lab / folder / "rows.csv").resolve()
    with pytest.raises(DataError, match=r"'none\.csv'.*second.*configs.*here"):
        context.find("none.csv")


def test_that_a_name_is_in_two_places_is_told(lab: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("configs", "here"):
        (lab / folder / "rows.csv").write_text("x")
        plugin(lab / folder, "placed_twice")
    DataContext(ByteTokenizer(), places=Places(search=(lab / "configs",))).find("rows.csv")
    (lab / "configs" / "mine.yaml").write_text("base: train/tiny_moe\nplugins: [placed_twice]\n")
    assert run(["explain", str(lab / "configs" / "mine.yaml")]) == 0
    first, second = (record.getMessage() for record in caplog.records)
    assert f"{lab / 'configs' / 'rows.csv'} is read, and not {lab / 'here' / 'rows.csv'}" in first
    assert f"{lab / 'configs' / 'placed_twice.py'} is taken, and not {lab / 'here' / 'placed_twice.py'}" in second


def test_the_places_of_a_run_are_stored_with_it(lab: Path) -> None:
    """So that what was found in the current folder is found from another one."""
    (lab / "configs" / "mine.yaml").write_text("base: train/tiny_moe\ndata: {source: {name: text, paths: [texts]}}\n")
    config = load_config([str(lab / "configs" / "mine.yaml")], RunConfig).config
    assert config.search_path[0] == str(lab / "configs")
    assert config.search_path[-1] == str(lab / "here")


def test_a_projects_folder_does_not_hide_the_package_in_it(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`placed_project/placed_project/__init__.py`, with the outer one's folder on sys.path, as `python -m` has it."""
    package = lab / "here" / "placed_project" / "placed_project"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    plugin(package, "parts")
    monkeypatch.syspath_prepend(str(lab / "here"))
    config = package.parent / "mine.yaml"
    config.write_text("base: train/tiny_moe\nplugins: [placed_project.parts]\n")
    assert run(["explain", str(config)]) == 0
