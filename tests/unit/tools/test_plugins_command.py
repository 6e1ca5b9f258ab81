"""`moelab plugins`: a line each, all of one by name, one kind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moelab import Registry
from moelab_tools import terminal
from moelab_tools.cli import run
from moelab_tools.describe_plugins import describe_plugins
from moelab_tools.described import FILE, described


def test_the_list_is_a_line_for_each_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(terminal, "make_console", lambda width=None: Console(file=file, width=80))
    assert run(["plugins"]) == 0
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    listed = sum(line.startswith("  ") and not line.startswith("   ") for line in lines)
    assert len(lines) < 2.5 * listed, "a line for each, and now and then two or three"
    assert "balance losses  (model.moe.balance_losses)" in lines
    assert any(line.startswith("  sigmoid_topk  ") for line in lines)


@pytest.mark.parametrize("kind", ["routers", "router", "model.moe.router", "moelab_routers"])
def test_a_kind_goes_by_any_of_its_names(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", kind]) == 0
    shown = capsys.readouterr().out
    assert "\n  switch " in shown
    assert "shared experts" not in shown


def test_a_name_shows_all_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "sigmoid_topk"]) == 0
    shown = capsys.readouterr().out
    assert "bias_update_rate: float = 0.001  # balance=bias: a step towards the under-used" in shown
    assert "Source: DeepSeek-V3" in shown
    assert "softmax_topk  Softmax" not in shown
    assert run(["plugins", "sigmoid_topk", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["sigmoid_topk"]


def test_a_name_of_two_kinds_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "random"]) == 0
    shown = capsys.readouterr().out
    assert "recipe.experts" in shown
    assert "recipe.shared" in shown


def test_a_word_that_is_neither_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plugins", "sigmoid_topq"]) == 2
    assert "did you mean 'sigmoid_topk'" in capsys.readouterr().err


def test_the_built_in_ones_are_listed_without_torch_and_as_they_describe_themselves() -> None:
    kept = described([], entry_points=False)
    said = describe_plugins(Registry(entry_points=False))
    assert kept == said, "run: python -m moelab_tools.plugin_pages docs/plugins"
    code = "import sys; from moelab_tools.cli import run; run(['plugins', 'entry_points=false'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "  sigmoid_topk  " in done.stdout


def test_other_plugins_and_changed_sources_are_asked_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert described(["my_lab"], entry_points=False) is None
    other = json.loads(FILE.read_text())
    other["moelab_plugins.routers.switch"]["source"] = "another"
    for text in (json.dumps(other), "[]", "{"):
        (tmp_path / "described.json").write_text(text)
        monkeypatch.setattr("moelab_tools.described.FILE", tmp_path / "described.json")
        assert described([], entry_points=False) is None


def test_an_installed_package_that_may_offer_plugins_is_asked(heavy_stranger: Path) -> None:
    assert described([], entry_points=True) is None
