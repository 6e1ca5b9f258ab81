"""Text of strangers: nothing in it acts on a terminal, nothing in it is endless."""

from __future__ import annotations

import unicodedata

import pytest

from moelab.errors import CheckpointError, RunFailure
from moelab.printable import LONGEST_MESSAGE, cut, printable, ranges


def test_no_character_that_acts_is_left() -> None:
    every = "".join(map(chr, range(0x110000)))
    left = {unicodedata.category(c) for c in printable(every)} & {"Cc", "Cs", "Zl", "Zp"}
    assert not left
    assert not set(printable(every)) & set("\u202e\u2066\u200f\u200b\ufeff\U000e0041")


def test_what_is_seen_stays_as_it_is() -> None:
    text = "naïve Ωmega 中文 नमस्ते \u200cمی\u200cخواهم 👩\u200d💻 [/red] \\x1b"
    assert printable(text) == text


@pytest.mark.parametrize(
    ("raw", "spelled"),
    [("\x1b]0;owned\a", "\\x1b]0;owned\\x07"), ("a\nb\tc", "a\\nb\\tc"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800")],
)
def test_controls_are_spelled_out(raw: str, spelled: str) -> None:
    assert printable(raw) == spelled


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    short = printable("begin " + "x" * 10_000 + " end", 200)
    assert len(short) <= 200
    assert short.startswith("begin ")
    assert short.endswith(" end")
    assert "10010 characters" in short


@pytest.mark.parametrize("limit", [0, 1, 10, 50])
def test_a_limit_holds_however_small(limit: int) -> None:
    assert len(printable("\x1b" * 1000, limit)) <= limit
    assert len(cut("y" * 1000, limit)) <= limit


@pytest.mark.parametrize("kind", [CheckpointError, RunFailure])
def test_an_error_is_short_and_printable_whatever_it_quotes(kind: type[Exception]) -> None:
    message = str(kind("file: the name '\x1b[2J" + "z" * 100_000 + "' is wrong\nmend it"))
    assert len(message) <= LONGEST_MESSAGE
    assert "\x1b" not in message
    assert message.endswith("is wrong\nmend it")


def test_whole_numbers_are_told_in_runs_of_neighbours() -> None:
    assert ranges([7, 1, 0, 2, 9, 10]) == "0-2, 7, 9-10"
    assert ranges([]) == ""
