"""Values by their types: text stays, numbers are exact, and a wrong one is told with its key."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import MISSING

from moelab.config.scalars import Plain
from moelab.config.text import read_tree
from moelab.config.typed import OPTIONS, SCHEMA, KeyProblem, Typing


class Colour(enum.Enum):
    """A choice."""

    red = 1
    blue = 2


@dataclass
class Inner:
    """A section."""

    width: int = MISSING
    words: list[str] = field(default_factory=lambda: ["a", "b"])


@dataclass
class Everything:
    """Each kind of field."""

    text: str = "t"
    maybe: str | None = None
    number: int = 1
    rate: float = 0.5
    flag: bool = False
    either: str | list[str] = "x"
    count: int | str = 0
    domains: dict[str, list[str]] = field(default_factory=dict)
    anything: Any = None
    kind: Literal["a", "b", 3] = "a"
    colour: Colour = Colour.red
    path: Path = Path()
    pair: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=lambda: Inner(width=4))


def _read(text: str) -> Everything:
    return OPTIONS.build(Everything, read_tree(text, "x"))


@pytest.mark.parametrize(
    "word", ["0123", "1e5", "yes", "no", "True", "true", "1_000", "2026-01-01", "0x10", "12:30:00", "+1", "1.", "5"]
)
def test_a_text_stays_the_characters_typed(word: str) -> None:
    made = _read(f"text: {word}\nmaybe: {word}\neither: [{word}]\ndomains: {{{word}: [{word}]}}\npath: {word}\n")
    assert (made.text, made.maybe, made.either, made.domains) == (word, word, [word], {word: [word]})
    assert str(made.path) == word


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_null_is_no_text_and_a_quoted_one_is(word: str) -> None:
    assert _read(f"maybe: {word}").maybe is None
    assert _read(f"maybe: '{word}'\ntext: '{word}'").maybe == word
    with pytest.raises(KeyProblem, match=r"^text: must be a text"):
        _read(f"text: {word}")


@pytest.mark.parametrize(("word", "value"), [("1e-3", 1e-3), ("3", 3.0), ("'1e-3'", 1e-3), ("1_000", 1000.0)])
def test_a_float_takes_every_number(word: str, value: float) -> None:
    assert _read(f"rate: {word}").rate == value


@pytest.mark.parametrize(
    ("word", "value"), [("7", 7), ("7.0", 7), ("1e3", 1000), ("0x10", 16), ("010", 10), ("'5'", 5), ("-2", -2)]
)
def test_an_integer_takes_whole_numbers(word: str, value: int) -> None:
    made = _read(f"number: {word}").number
    assert made == value
    assert type(made) is int


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "1", "'true'", "y"])
def test_a_bool_takes_the_words_for_it(word: str) -> None:
    assert _read(f"flag: {word}").flag is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number: 2.5", "number: .*2.5.* no whole number"),
        ("number: true", "number: .*true.* of type 'bool' could not be converted to Integer"),
        ("number: 9223372036854775808", "number: .*too large"),
        ("number: " + "9" * 6000, "number: .*6000 characters"),
        ("number: {a: 1}", "number: .*of type 'dict'"),
        ("rate: fast", "rate: .*'fast' of type 'str' could not be converted to Float"),
        ("rate: nan", "rate: must be a finite number"),
        ("flag: 2", "flag: .*'2' is not a valid bool"),
        ("text: [a]", "text: must be a text, not a list"),
        ("domains: [a]", "domains: must be a mapping of keys, not a list"),
        ("domains: {a: b}", "domains.a: must be a list, not 'b'"),
        ("inner: 3", "inner: must be a mapping of keys, not '3'"),
        ("inner: {width: wide}", "inner.width: .*'wide'"),
        ("inner:\n  width: ???", r"inner.width: has no value yet; set it in a file or as inner.width=\.\.\."),
        ("inner: {with: 1}", "inner.with: no such key; it takes: width, words"),
        ("kind: c", "kind: must be one of a, b, 3, not 'c'"),
        ("colour: green", "colour: must be one of red, blue, not 'green'"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(text: str, message: str) -> None:
    with pytest.raises(KeyProblem, match=f"^{message}") as caught:
        _read(text)
    assert len(str(caught.value)) < 400


@dataclass
class Limits:
    """Numbers of which one has no limit where nothing else is said."""

    endless: float = float("inf")
    either: float | None = float("inf")
    ended: float = 1.0
    many: list[float] = field(default_factory=list)


@pytest.mark.parametrize("typing", [SCHEMA, OPTIONS])
def test_infinity_is_for_fields_that_start_with_it(typing: Typing) -> None:
    for key in ("endless", "either"):
        assert getattr(typing.build(Limits, {key: Plain("-.inf")}), key) == -float("inf")
    for tree in ({"ended": Plain(".inf")}, {"ended": Plain("1e999")}, {"many": [Plain(".inf")]}, {"endless": ".nan"}):
        with pytest.raises(KeyProblem, match="finite"):
            typing.build(Limits, tree)


def test_a_place_without_a_type_keeps_the_word_in_a_config_and_decides_it_in_options() -> None:
    assert type(SCHEMA.build(Everything, {"anything": Plain("8e-3")}).anything) is Plain
    assert OPTIONS.build(Everything, {"anything": [Plain("8e-3"), "8e-3"]}).anything == [8e-3, "8e-3"]


def test_a_value_that_fits_one_arm_of_a_union_goes_there() -> None:
    assert _read("count: 010").count == 10
    assert _read("count: '010'").count == "010"
    assert _read("either: a").either == "a"


def test_other_kinds_of_fields() -> None:
    made = _read("kind: 3\ncolour: blue\npair: [3, 4, 5]\ninner: {words: [0123]}")
    assert (made.kind, made.colour, made.pair) == (3, Colour.blue, (3, 4, 5))
    assert made.inner == Inner(width=4, words=["0123"])


def test_items_of_a_default_list_are_set_by_their_index() -> None:
    assert _read("inner: {words: {1: 0123}}").inner.words == ["a", "0123"]


def test_values_of_python_callers_are_taken_too() -> None:
    given = {"text": 5, "rate": 1, "path": Path("a"), "either": ["a"], "flag": True}
    made = OPTIONS.build(Everything, given)
    assert (made.text, made.rate, made.path, made.either, made.flag) == ("5", 1.0, Path("a"), ["a"], True)
