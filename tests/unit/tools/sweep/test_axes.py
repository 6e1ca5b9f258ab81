"""The grammar of a sweep's command line: which words are axes, and what is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab.config.files import override_layer
from moelab.errors import ConfigError
from moelab_tools.sweep.axes import MOST_RUNS, parse_axis, parse_words, split_values, whole_numbers


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=0..3", ["0", "1", "2", "3"]),
        ("seed=-1..1", ["-1", "0", "1"]),
        ("seed=0..1,7", ["0", "1", "7"]),
        ("seed=3", ["3"]),
        ("optimizer.lr=1e-3, 3e-3", ["1e-3", "3e-3"]),
        ("x=[a, b]", ["[a, b]"]),
        ("x=[a, b],[c]", ["[a, b]", "[c]"]),
        ("x={name: u, n: 8},{name: u, n: 16}", ["{name: u, n: 8}", "{name: u, n: 16}"]),
        ('x="a, b"', ['"a, b"']),
        ('x="0..4"', ['"0..4"']),
        ("x='it''s, so',b", ["'it''s, so'", "b"]),
        ('x="a \\", b",c', ['"a \\", b"', "c"]),
        ("x={a: '}, ['},b", ["{a: '}, ['}", "b"]),
        ("x=[don't, b],c", ["[don't, b]", "c"]),
        ("x=../data", ["../data"]),
        ("x=", [""]),
        ("x=a=b,c=d", ["a=b", "c=d"]),
    ],
)
def test_a_word_has_these_values(word: str, values: list[str]) -> None:
    assert list(parse_axis(word).values) == values


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("x=a,,b", "empty value"),
        ("x=a,", "empty value"),
        ("x=4..0", "write 0..4"),
        ("x=0.1..0.5", "whole numbers"),
        ("x=1..", "whole numbers"),
        ("x=0...4", "whole numbers"),
        ("x=1,2,1", "twice"),
        ("x=0..2,1", "twice"),
        ("x=[a,b", "no ] that closes it"),
        ('x="a', "that closes it"),
        ("x='a'b", "put a comma there"),
        ("x=0..99999999999", f"{MOST_RUNS} at most"),
        ("run_dir=a,b", "--out"),
        ("name=a", "--out"),
        ("resume=true", "same command again"),
    ],
)
def test_a_word_that_means_nothing_is_refused_by_its_key(word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        parse_axis(word)
    assert str(raised.value).startswith(word.split("=", maxsplit=1)[0])


def test_the_product_keeps_the_order_of_overrides_and_multiplies_seeds_last() -> None:
    words = parse_words(["a.yaml", "seed=0..1", "x=1,2", "y=3", "z=a,b", "b.yaml"])
    assert [axis.key for axis in words.axes] == ["seed", "x", "z"]
    assert len(list(words.choices(of_seeds=False))) == 4
    assert list(words.choices(of_seeds=True)) == [{"seed": "0"}, {"seed": "1"}]
    assert words.arguments({"x": "2", "z": "b", "seed": "1"}) == ["a.yaml", "b.yaml", "seed=1", "x=2", "y=3", "z=b"]


def test_an_axis_that_is_given_twice_or_makes_too_many_runs_is_refused() -> None:
    for again in ("x=3", "x=3,4"):
        with pytest.raises(ConfigError, match="x: is given again"):
            parse_words(["x=1,2", again])
    assert len(parse_words(["x=3", "x=1,2"]).axes) == 1
    assert parse_words(["x=1", "x=3"]).arguments({}) == ["x=1", "x=3"]
    with pytest.raises(ConfigError, match=f"{MOST_RUNS} at most"):
        parse_words(["a=1..200", "b=1..200"])


@given(st.lists(st.sampled_from(["a", "[1, 2]", "{k: v}", '"x, y"', "'q'"]), min_size=1, max_size=5))
def test_values_joined_by_commas_come_apart_again(values: list[str]) -> None:
    assert split_values(", ".join(values), "key") == values


@given(st.text(max_size=30))
def test_every_value_of_any_text_is_an_override_or_refused(text: str) -> None:
    """Whatever is typed: an error of ours, or values that `moelab train` reads or refuses with one of ours."""
    try:
        for argument in parse_axis(f"key={text}").arguments():
            override_layer(argument)
    except ConfigError:
        pass


def test_whole_numbers_are_ranges_or_lists() -> None:
    assert whole_numbers("0..2,5", "seeds") == [0, 1, 2, 5]
    with pytest.raises(ConfigError, match="seeds"):
        whole_numbers("a,b", "seeds")
