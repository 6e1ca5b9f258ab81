"""Whatever a command prints, names of strangers act on nothing in the terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.progress import Progress
from rich.table import Table

from moelab_tools.cli import run
from moelab_tools.terminal import Guard, guarded, make_console, wrapped

BAD = "\x1b]0;owned\x07\x1b[31mred\u202e"


def test_print_and_stderr_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        print("a\tb", BAD)
        print(BAD, file=sys.stderr)
    told = capsys.readouterr()
    assert told.out == "a\tb \\x1b]0;owned\\x07\\x1b[31mred\\u202e\n"
    assert told.err == "\\x1b]0;owned\\x07\\x1b[31mred\\u202e\n"


def test_a_terminal_without_the_characters_gets_their_numbers() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Guard(raw).write("é \udcff")
    raw.flush()
    assert raw.buffer.getvalue() == b"\\xe9 \\udcff"  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        Guard(raw).write(b"x")  # type: ignore[arg-type]


def test_rich_keeps_its_styles_and_loses_those_of_texts(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        console = make_console(80)
        console._force_terminal = True
        table = Table(BAD)
        table.add_row(BAD)
        console.print(table)
        console.print(f"[bold]{BAD}[/bold]", soft_wrap=True)
    told = capsys.readouterr().out
    assert "\x1b]0;" not in told
    assert "\x1b[31m" not in told
    assert "\u202e" not in told
    assert told.count("\\x1b]0;owned") == 3


def test_what_was_typed_is_quoted_short_and_printable(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "x", "--dtype" + BAD + "y" * 9000]) == 2
    told = capfd.readouterr().err
    assert "\x1b" not in told
    assert len(told.partition("Error: ")[2]) < 2000


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_bar_moves_on_a_terminal_and_a_print_beside_it_acts_on_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is drawn rich stands over both streams: its controls must reach the terminal, a text's must not."""
    terminal = _Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, name, terminal)
    with guarded(), Progress(console=make_console(stderr=name == "stderr"), refresh_per_second=100) as bar:
        bar.update(bar.add_task("task", total=2), completed=1, refresh=True)
        print("beside", BAD)
    told = terminal.getvalue()
    assert "\x1b[" in told
    assert "\\x1b[2K" not in told, "the bar's own controls are spelled out"
    assert "beside" in told
    assert "\x1b]0;" not in told
    assert "\u202e" not in told


def test_a_long_line_breaks_between_words_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "short\n  warning: one-word and a/path/longer/than/the/terminal told"
    assert wrapped(text, io.StringIO()) == text
    assert wrapped(text, _Terminal()).split("\n") == [
        "short", "  warning: one-word", "    and", "    a/path/longer/than/the/terminal", "    told",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["architectures"], ["explain", "model/qwen2-57b-a14b"]])
def test_tables_of_whole_models_fit_80_columns(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich: write as to a terminal
    assert run(arguments) == 0
    told = capsys.readouterr().out
    assert "57,408,658,944" in told
    assert [line for line in told.splitlines() if len(line) > 80] == []
    tables = told.count("Vocabulary ")  # of as many models as have room side by side
    assert len(told.splitlines()) < max(45, 21 * tables)
