"""Paths as a person writes them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from moelab.errors import ConfigError
from moelab.paths import folder_named, unresolved_hint, user_path


def test_a_tilde_is_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/a") == tmp_path / "runs" / "a"
    assert user_path("~") == tmp_path
    assert user_path(Path("~/x")) == tmp_path / "x"
    monkeypatch.chdir(tmp_path / "..")
    assert user_path(user_path("./~/x")) == Path.cwd() / "~" / "x"  # a name, also when it is asked again
    assert user_path("a/~/b") == Path("a/~/b")


def test_an_unknown_user_and_no_path_at_all_are_refused_with_the_key() -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: '~no_such_user_here/x'.*\./~no_such_user_here/x"):
        user_path("~no_such_user_here/x", "run_dir")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: names no path"):
        user_path("", "data.tokenizer")


@pytest.mark.parametrize("path", ["x" * 256, "é" * 128, "a/" * 2100, "a\0b"])
def test_what_no_file_system_takes_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir: .* is no path"):
        user_path(path, "run_dir")


def test_a_value_of_the_environment_is_explained() -> None:
    assert "pass that config again" in unresolved_hint("${oc.env:DATA}/a")
    assert unresolved_hint("data/a") == ""


def test_a_text_that_may_be_anything_names_a_folder_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_named("~") == tmp_path == folder_named(str(tmp_path))
    for text in ("", "~no_such_user_here/x", "a\0b", "x" * 5000, "\ud800", str(tmp_path / "none")):
        assert folder_named(text) is None


def test_nobody_else_makes_a_path_of_what_a_user_wrote(root: Path) -> None:
    """One place expands `~`: no second `expanduser`, no `Path(config.run_dir)`, no `click.Path`."""
    found = []
    for folder in ("core", "plugins", "upcycling", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            if path.name != "paths.py" and "expanduser" in text:
                found.append(f"{path}: expanduser")
            for node in ast.walk(ast.parse(text)):
                call = ast.unparse(node) if isinstance(node, ast.Call) else ""
                if re.match(r"Path\((config|options|run|setup\.config|loaded\.config)\.(?!run_dir\)\.name)", call):
                    found.append(f"{path}: {call}")
                if call.startswith("click.Path("):
                    found.append(f"{path}: {call}")
    assert not found


def test_a_path_that_is_no_utf8_is_refused_where_it_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--output: .*\\udcff.* is not UTF-8"):
        user_path("report\udcff", "--output")
