"""What unquoted words mean, and that their characters are never lost."""

from __future__ import annotations

import math

import pytest

from moelab.config.scalars import Plain, meaning, scalar, settle, spelled


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("NULL", None), ("true", True), ("FALSE", False),
        ("8", 8), ("+1", 1), ("-0", 0), ("010", 10), ("0x10", 16), ("0o17", 15), ("0b101", 5), ("1_000", 1000),
        ("1e-3", 1e-3), ("8E-3", 8e-3), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("1_0.5", 10.5),
    ],
)  # fmt: skip
def test_numbers_and_words_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = meaning(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "off", "2026-01-01", "12:30:00", "1e", "_1", "1__0", "0x", "inf", "nan", "٣", "1,5", "=",
    "9" * 5000],
)  # fmt: skip
def test_everything_else_is_its_characters(text: str) -> None:
    assert meaning(text) == text


@pytest.mark.parametrize("text", ["0123", "1e5", "8e-3", "True", "0x10", "1_000", "~", "", "1e-05", "???"])
def test_a_word_whose_value_would_forget_its_characters_waits_for_its_type(text: str) -> None:
    assert type(scalar(text)) is Plain
    assert str(scalar(text)) == text


@pytest.mark.parametrize("text", ["8", "0.5", "true", "null", "hash", "-3", "yes"])
def test_a_word_that_its_value_gives_back_is_that_value(text: str) -> None:
    assert type(scalar(text)) is not Plain
    assert spelled(scalar(text)) == text


@pytest.mark.parametrize("value", [None, True, False, 0, -7, 0.1, 1e-8, 1e300, 1.5e-9, 3.0, math.inf, -math.inf])
def test_what_is_spelled_means_the_same_again(value: object) -> None:
    assert meaning(spelled(value)) == value


def test_settling_a_tree_leaves_no_word_undecided() -> None:
    assert settle({"a": [Plain("1e3"), "1e3"], "b": {"c": Plain("True")}}) == {"a": [1000.0, "1e3"], "b": {"c": True}}
