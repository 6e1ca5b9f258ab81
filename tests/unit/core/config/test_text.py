"""YAML in and out: what is read, what is refused, and that writing and reading are inverse."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from moelab.config.interpolation import leaves
from moelab.config.scalars import settle
from moelab.config.text import read_tree, write_tree
from moelab.errors import ConfigError

TRICKY = [
    "0123", "1e5", "1e-3", "8e-3", "yes", "no", "on", "null", "~", "", "true", "True", "1_000", "0x10", "0o17",
    "2026-01-01",
    "12:30:00", "???", "<<", "=", ".inf", ".5", "1.", "+1", "- x", "? x", "a: b", "a #b", "#b", "*a", "&a", "!a",
    "%a", "@a", "`a",
    "|", ">", "{a", "[a", "'", '"', "'a'", '"a"', " a", "a ", "a\nb", "a\r\nb", "\n", "\t", "\t a", "a\\nb", "\\",
    "${a}", "\\${a}",
    "\\\\${a}", "é", "🙂", "\u2028", "\x85", "\ufeffa", "\x1b[31m", "a" * 500, ("a" * 130 + " ") * 3, "---", "...",
    "a:", ":a", "::",
]  # fmt: skip
QUICK = [
    *(path.read_text() for path in sorted((Path(__file__).parents[4] / "configs").rglob("*.yaml"))),
    write_tree({f"key {i}": [text, {text or "none": text}] for i, text in enumerate(TRICKY)}), "", "a: &b [1, {c: *b}]",
    "a: &b {c: 1}\nd: {<<: *b, e: 0123}", "a: 1e-3\nb: .inf\nc: null\nd:\n- - 1\n  - 2\n", "a: 1\na: 2",
    "a: !!python/x 1",
]  # fmt: skip
BOMB = "- &a0 [x]\n" + "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))


@pytest.mark.parametrize("text", TRICKY)
def test_a_text_reads_back_as_it_was_by_us_and_by_any_yaml_reader(text: str) -> None:
    tree = {"key": text, "list": [text, {"deep": text}]}
    assert read_tree(write_tree(tree), "x") == tree
    assert all(type(leaf) is str for leaf in (read_tree(write_tree(tree), "x")["key"],))
    assert yaml.safe_load(write_tree(tree)) == tree


def test_random_texts_read_back_as_they_were() -> None:
    draw = random.Random(0)
    alphabet = "".join(TRICKY) + "abc019 \n\t:#-,[]{}'\"\\$"
    for _ in range(500):
        tree = {"".join(draw.choices(alphabet, k=6)): "".join(draw.choices(alphabet, k=draw.randrange(12)))}
        assert read_tree(write_tree(tree), "x") == tree


@pytest.mark.parametrize("word", ["0123", "8e-3", "True", "0x10", "~", "1_000", "2026-01-01", "???"])
def test_an_unquoted_word_stays_unquoted(word: str) -> None:
    tree = read_tree(f"key: {word}\n", "x")
    again = read_tree(write_tree(tree), "x")
    assert (again, type(again["key"])) == (tree, type(tree["key"]))


@pytest.mark.parametrize("value", [1e-8, 1e300, 0.1, 3.0, -2, 0, True, None, 2**62])
def test_numbers_read_back_as_they_were_by_us_and_by_any_yaml_reader(value: object) -> None:
    assert settle(read_tree(write_tree({"k": value}), "x")) == {"k": value} == yaml.safe_load(write_tree({"k": value}))


def test_keys_are_text() -> None:
    assert read_tree("{0: a, 010: b, true: c, 1.5: d, ~: e}", "x") == {
        "0": "a",
        "010": "b",
        "true": "c",
        "1.5": "d",
        "~": "e",
    }


def test_aliases_and_merge_keys_work_and_share_nothing() -> None:
    tree = read_tree("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {y: 4, <<: [*a, {z: 5}]}\n", "x")
    assert tree["b"] == tree["a"]
    assert tree["b"] is not tree["a"]
    assert tree["c"] == {"x": 1, "y": 3}
    assert tree["d"] == {"x": 1, "y": 4, "z": 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "'a' stands twice", "line 1"]),
        ("a: {b: 1, b: 2}", ["'b' stands twice"]),
        ("a:\n\tb: 1\n", ["line 2", "tab"]),
        ("a: b: c", ["line 1"]),
        ("a: [1", ["line 1"]),
        ("? [a]\n: 1\n", ["a key must be a word"]),
        ("a: !!python/object/apply:os.getcwd []", ["no such type", "os.getcwd"]),
        ("a: !!timestamp 2026-01-01", ["no such type"]),
        ("a: 1\n---\nb: 2\n", ["another document"]),
        ("a: \x00", ["line 1", "U+0000"]),
        ("a: &a [*a]", ["recursive"]),
        ("[" * 5000 + "]" * 5000, ["nested too deeply"]),
        ('a: "\\uD800"', ["half of a surrogate pair"]),
        ('{b: {"\\uDFFF": 1}}', ["half of a surrogate pair"]),
        ("[" * 90 + "]" * 90, ["nested too deeply"]),
        (BOMB, ["aliases"]),
    ],
)  # fmt: skip
def test_what_is_no_config_is_one_line_with_its_place(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tree(text, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: ")
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", QUICK)
def test_the_quick_reader_reads_what_the_patient_one_reads(text: str) -> None:
    def read(quick: bool) -> str:
        try:
            return repr([(path, type(leaf), leaf) for path, leaf in leaves(read_tree(text, "x", quick=quick))])
        except ConfigError as error:
            return str(error)

    assert read(quick=True) == read(quick=False)


@pytest.mark.parametrize("deep", ["[" * 100_000, "- " * 100_000, "? " * 100_000, "{a: " * 100_000])
def test_what_is_nested_without_end_takes_no_stack(deep: str) -> None:
    with pytest.raises(ConfigError, match=r"nested too deeply|can't be read"):
        read_tree(deep, "x", quick=True)
