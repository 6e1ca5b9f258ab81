"""Each tagger's rule, by texts of known kinds, and the installed text."""

from __future__ import annotations

from typing import Any

import pytest

from moelab import ConfigError, Document, FilterContext, Registry
from moelab.hookspecs import TAGGERS, TEXT_FILTERS
from moelab_plugins.data_sources.embedded import read_domain

REGISTRY = Registry(entry_points=False, points=[TAGGERS, TEXT_FILTERS])


def say(name: str, text: str, **options: Any) -> str:
    context = FilterContext(registry=REGISTRY)
    return REGISTRY.build(TAGGERS, {"name": name, **options}, context, "tags.0")(Document(text, "d", "n"))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "All human beings are born free and equal in dignity and rights. They are endowed with reason."),
        (
            "de",
            "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.",
        ),
        ("fr", "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison."),
        ("es", "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón."),
        (
            "pt",
            "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão.",
        ),
        (
            "it",
            "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione.",
        ),
        (
            "nl",
            "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand.",
        ),
        ("zh", "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。" * 2),
        ("ja", "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。" * 2),
        (
            "ko",
            "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다." * 2,
        ),
        ("cyrillic", "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом."),
        ("latin", "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan."),
        ("", "12 + 30 = 42"),
    ],
)
def test_language_by_frequent_words_or_by_script(language: str, text: str) -> None:
    assert say("language", text) == language


def test_size_is_the_class_of_the_number_of_characters() -> None:
    assert [say("size", "x" * n, borders=[10, 20]) for n in (0, 9, 10, 19, 20)] == [
        "0-9", "0-9", "10-19", "10-19", "20+",
    ]  # fmt: skip
    with pytest.raises(Exception, match="don't rise"):
        say("size", "", borders=[10, 10])


def test_code_is_told_apart_from_prose_in_the_installed_text() -> None:
    expected = {"code_py": "python", "docs_en": "no", "legal": "no"}
    for domain, wanted in expected.items():
        documents = read_domain(domain, 0, 400_000)
        found = [say("code", document.text) for document in documents]
        assert found.count(wanted) >= 0.9 * len(documents), (domain, found)
    snippet = "#include <vector>\n\nint main(int argc, char** argv) {\n  return 0;\n}\n"
    assert say("code", snippet) == "c"
    assert say("code", "fn main() {\n    let mut x = 1;\n}") == "rust"
    assert say("code", "") == "no"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("doctest", "Adds.\n\n    >>> 1 + 1\n    2\n"),
        ("no", ">>> import this\n\nand nothing is printed"),
        ("test", "def test_it():\n    assert f(1) == 2\n"),
        ("answer", "She has 3 + 4 apples.\n#### 7\n"),
        ("answer", r"so the sum is $\boxed{12}$."),
        ("proof", "Lemma one. Let x be."),
        ("no", "I assert that the answer is unknown, said she."),
    ],
)
def test_what_can_be_verified(kind: str, text: str) -> None:
    assert say("verifiable", text) == kind


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("write", "Please write a poem about spring."),
        ("question", "What is the capital of France?"),
        ("no", "What a day it was."),
        ("transform", "User: Summarize the following text.\n\nWhy?"),
        ("code", "Implement quicksort in Rust."),
        ("choose", "classify these: a, b"),
        ("no", "The cat sat on the mat."),
        ("no", ""),
    ],
)
def test_an_instruction_is_told_by_its_first_word(kind: str, text: str) -> None:
    assert say("instruction", text) == kind


def test_passes_says_what_filters_would_make_of_a_text_one_after_the_other() -> None:
    short, letters = {"name": "length", "min_characters": 10}, {"name": "characters", "min_letters": 0.6}
    words, figures = "a sentence of words", "12 + 30 = 42, and 7 * 6 too"
    assert [say("passes", text, filters=[short, letters]) for text in (words, figures, "words")] == ["yes", "no", "no"]
    assert say("passes", "", filters=[]) == "yes"
    spaced = "words         \n"  # ten characters and more, until white space is put in order
    assert say("passes", spaced, filters=[short]) == "yes"
    assert say("passes", spaced, filters=[{"name": "normalise"}, short]) == "no"


def test_passes_names_the_filter_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"tags\.passes\.filters\.1\.name: no text filter 'lenght'.*'length'"):
        say("passes", "", filters=[{"name": "normalise"}, {"name": "lenght"}])
    with pytest.raises(ConfigError, match="without a registry"):
        REGISTRY.build(TAGGERS, {"name": "passes", "filters": [{"name": "length"}]}, FilterContext(), "tags.0")


def test_gaps_and_lines_of_megabytes_take_no_longer_than_others() -> None:
    """Tried anew from each of a million empty lines, or from each arrow of minified code, they would take days."""
    gap = "\n" * 1_000_000
    assert say("verifiable", gap + "x") == "no"
    assert say("verifiable", gap + "  #### 42\n") == "answer"
    assert say("code", "a->b(c)," * 500_000 + "\n" + "def f(x):\n    return x\n" * 3) == "python"
