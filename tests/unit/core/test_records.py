"""Typed access: each look says what must stand there, and complains by file and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moelab.errors import CheckpointError
from moelab.records import Record
from moelab.safe_files import Reading


def _record(**values: Any) -> Record:
    return Record("a/state.json", values, Reading(CheckpointError, "use an earlier checkpoint"))


def test_values_of_the_right_kind_are_handed_out() -> None:
    record = _record(step=3, loss=2, name="x", done=True, inner={"a": [1, 2]}, none=None)
    assert record.integer("step", least=0, most=3) == 3
    assert record.number("loss") == 2.0
    assert record.text("name") == "x"
    assert record.flag("done") is True
    assert record.record("inner").listed("a", int) == [1, 2]
    assert record.integer("none", None) is None
    assert record.text("absent", "other") == "other"
    assert record.record("absent", optional=True).values == {}
    assert "step" in record
    assert "none" not in record


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (lambda r: r.integer("text"), r"a/state.json: text: is 'a'; it must be a whole number"),
        (lambda r: r.integer("flag"), "flag: is True"),
        (lambda r: r.integer("half"), "half: is 0.5"),
        (lambda r: r.integer("less", least=0), r"less: is -1; it must be a whole number in 0 \.\."),
        (lambda r: r.integer("absent"), "absent: is missing"),
        (lambda r: r.number("text"), "a number"),
        (lambda r: r.number("nan"), "a finite number"),
        (lambda r: r.text("less"), "a text"),
        (lambda r: r.text("text", longest=0), "at most 0"),
        (lambda r: r.flag("less"), "true or false"),
        (lambda r: r.record("less"), "an object"),
        (lambda r: r.record("inner").integer("key"), "a/state.json: inner.key: is a list"),
        (lambda r: r.listed("mixed", int), "a list of whole numbers"),
        (lambda r: r.listed("mixed", str), "a list of texts"),
        (lambda r: r.listed("text", str), "a list of texts"),
        (lambda r: r.record("inner").numbers(), "inner.key: is a list"),
    ],
)
def test_another_kind_is_refused_with_file_key_and_cure(look: Callable[[Record], Any], said: str) -> None:
    record = _record(text="a", flag=True, half=0.5, less=-1, nan=float("nan"), inner={"key": [1]}, mixed=[1, True])
    with pytest.raises(CheckpointError, match=said) as caught:
        look(record)
    assert str(caught.value).endswith("; use an earlier checkpoint")


def test_what_is_quoted_is_short_and_printable() -> None:
    with pytest.raises(CheckpointError) as caught:
        _record(**{"\x1b[2J": "\x07" * 10_000}).integer("\x1b[2J")
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)
