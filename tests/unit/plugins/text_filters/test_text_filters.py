"""Each filter's rule, by texts that stand on either side of it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moelab import ConfigError, DataError, Document, FilterContext, Places, Registry, Rejected
from moelab.hookspecs import TEXT_FILTERS

REGISTRY = Registry(entry_points=False, points=[TEXT_FILTERS])


def ask(name: str, text: str, base: Path = Path(), **options: Any) -> Document | Rejected:
    apply = REGISTRY.build(TEXT_FILTERS, {"name": name, **options}, FilterContext(Places(search=(base,))), "stages.0")
    return apply(Document(text, "d", "n"))


def kept(name: str, text: str, **options: Any) -> bool:
    return isinstance(ask(name, text, **options), Document)


def test_normalise_gives_one_spelling() -> None:
    answer = ask("normalise", "\ufeffcafe\u0301 \r\nb\x07\t\rc  ")
    assert isinstance(answer, Document) and answer.text == "caf\u00e9\nb\nc"
    unchanged = ask("normalise", "a \x07", form=None, trailing_space=True, controls=True)
    assert isinstance(unchanged, Document) and unchanged.text == "a \x07"


def test_length_counts_characters_and_words() -> None:
    assert kept("length", "abc def", min_characters=7, max_characters=7, min_words=2, max_words=2)
    for limit in ({"min_characters": 8}, {"max_characters": 6}, {"min_words": 3}, {"max_words": 1}):
        assert not kept("length", "abc def", **limit)


def test_characters_counts_shares_of_what_is_no_white_space() -> None:
    text = "ab \u4e2d 12 \n+-*/"  # 3 letters, 2 digits, 4 symbols
    assert kept("characters", text, min_letters=3 / 9, max_digits=2 / 9, max_symbols=4 / 9 + 1e-9)
    for limit in ({"min_letters": 0.34}, {"max_digits": 0.22}, {"max_symbols": 0.44}):
        assert not kept("characters", text, **limit)


WORDS = "a bb ccc dddd eeeee ffffff ggggggg hhhhhhhh iiiiiiiii jjjjjjjjjj"
OFF = {
    "duplicate_lines": None, "duplicate_line_characters": None, "duplicate_paragraphs": None,
    "duplicate_paragraph_characters": None, "top_ngrams": [], "duplicate_ngrams": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "limit", "share"),
    [
        ("x\nx\ny\nz", "duplicate_lines", 1 / 4),
        ("abcd\nabcd\nyz", "duplicate_line_characters", 4 / 12),
        ("x\n\nx\n\ny", "duplicate_paragraphs", 1 / 3),
        ("abcd\n\nabcd\n\nyz", "duplicate_paragraph_characters", 4 / 14),
    ],
)
def test_repetition_counts_what_was_there_before(text: str, limit: str, share: float) -> None:
    assert kept("repetition", text, **OFF | {limit: share + 1e-9})
    assert not kept("repetition", text, **OFF | {limit: share - 1e-9})


def test_repetition_of_ngrams_counts_characters_of_words_once() -> None:
    total = sum(map(len, WORDS.split()))  # 55
    twice = f"{WORDS} {WORDS}"
    assert kept("repetition", twice, **OFF | {"duplicate_ngrams": [[5, 0.5 + 1e-9]]})
    assert not kept("repetition", twice, **OFF | {"duplicate_ngrams": [[5, 0.5 - 1e-9]]})
    assert kept("repetition", WORDS, **OFF | {"duplicate_ngrams": [[2, 0.0]], "top_ngrams": [[2, 0.0]]})
    again = f"{WORDS} iiiiiiiii jjjjjjjjjj"  # the last two words stand twice: 2 * 19 of 74 characters
    share = 38 / (total + 19)
    assert kept("repetition", again, **OFF | {"top_ngrams": [[2, share + 1e-9]]})
    assert not kept("repetition", again, **OFF | {"top_ngrams": [[2, share - 1e-9]]})
    with pytest.raises(ConfigError, match=r"\[2.5, 0.1\] is no pair of a number of words and a share"):
        ask("repetition", WORDS, top_ngrams=[[2.5, 0.1]])


def test_blanks_that_end_no_line_take_no_longer_than_others() -> None:
    """Ten megabytes of blanks before a word: tried anew from each, they would take days."""
    long = "a" + " " * 10_000_000 + "b"
    unchanged, cut = ask("normalise", long), ask("normalise", long + " \t\u3000\n\n c\u2003\n")
    assert isinstance(unchanged, Document) and unchanged.text == long
    assert isinstance(cut, Document) and cut.text == long + "\n\n c\n"


def test_decontaminate_finds_a_run_of_words_whatever_their_case(tmp_path: Path) -> None:
    row = {"question": "How many roads must a man walk down?\u2028", "choices": ["forty two", "twelve or so of them"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    for name in ("test.jsonl", "zipped.jsonl.gz"):
        options = {"base": tmp_path, "against": [name], "words": 5, "least": 4}
        found = ask("decontaminate", "He sang: 'HOW MANY ROADS, must a' and left.", **options)
        assert found == Rejected("tested on", f"{name}: 'how many roads must a'")
        assert isinstance(ask("decontaminate", "how many roads must the", **options), Document)
        assert isinstance(ask("decontaminate", "twelve or so of them", **options), Rejected)  # a short one is whole
        assert isinstance(ask("decontaminate", "the answer is forty two", **options), Document)  # a word of many texts
    with pytest.raises(ConfigError, match="nothing to look for"):
        ask("decontaminate", "x")
    with pytest.raises(DataError, match=r"none of 3 texts has 13 words"):
        ask("decontaminate", "x", base=tmp_path, against=["test.jsonl"], least=13)


def test_decontaminate_looks_at_each_character_of_scripts_without_spaces(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("从前有座山，山里有座庙，庙里有个老和尚在讲故事。")
    options = {"base": tmp_path, "against": ["test.txt"]}
    assert isinstance(ask("decontaminate", "他说山里有座庙庙里有个老和尚在吗", **options), Rejected)
    assert isinstance(ask("decontaminate", "他说山里有座庙，庙里有个小和尚。", **options), Document)


def test_tasks_of_lm_eval_need_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs lm-evaluation-harness: pip install 'moelab\[lm-eval\]'"):
        ask("decontaminate", "x", tasks=["gsm8k"])


def test_a_filter_of_datatrove_needs_datatrove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.delitem(sys.modules, "datatrove.pipeline.filters", raising=False)
    part = {"name": "datatrove", "filter": "GopherQualityFilter"}
    with pytest.raises(ConfigError, match=r"needs datatrove .*: pip install 'moelab\[curate\]'"):
        Registry(entry_points=False).build(TEXT_FILTERS, part, FilterContext(), "stages.0")
