"""Whatever a command prints, names of strangers act on nothing in the terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from moelab_tools.cli import run
from moelab_tools.terminal import Guard, guarded, make_console

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
