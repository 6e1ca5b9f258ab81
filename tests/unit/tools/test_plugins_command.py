"""`moelab plugins`: a line each, all of one by name, one kind."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from moelab_tools import terminal
from moelab_tools.cli import run


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
