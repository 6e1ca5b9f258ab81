"""The split: a function of the text and of split_seed, and of nothing else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import DataContext, Document, build_corpus
from moelab.data.identity import split_value, text_identity

CONTEXT = DataContext(ByteTokenizer(), validation_fraction=0.2)
GIVEN = [Document(f"document {n} has number {n * 7919}", "ab"[n % 2], f"d{n}") for n in range(200)]


def held_out(documents: list[Document], context: DataContext = CONTEXT) -> set[str]:
    """The texts of the held-out documents, by their names."""
    corpus = build_corpus(documents, context)
    assert not set(corpus.train.document_names) & set(corpus.validation.document_names)
    by_name = {document.name: document.text for document in documents}
    return {by_name[name] for name in corpus.validation.document_names}


def test_a_document_is_held_out_iff_its_hash_lies_below_the_fraction() -> None:
    expected = {d.text for d in GIVEN if split_value(text_identity(d.text), 0) < 0.2}
    assert held_out(GIVEN) == expected
    assert 20 < len(expected) < 60


def test_the_split_is_the_same_whatever_else_is_chosen() -> None:
    whole = held_out(GIVEN)
    part = random.Random(0).sample(GIVEN, 100)
    assert held_out(part) == whole & {document.text for document in part}
    assert held_out([replace(d, domain=f"z{d.name[-1]}", name=f"x{d.name}") for d in GIVEN]) == whole
    assert held_out(GIVEN, replace(CONTEXT, seed=5)) == whole
    assert held_out([replace(d, text=f"  {d.text.upper()}\n") for d in GIVEN]) == {f"  {t.upper()}\n" for t in whole}


def test_a_smaller_fraction_holds_out_a_part_and_another_seed_others() -> None:
    assert held_out(GIVEN, replace(CONTEXT, validation_fraction=0.1)) < held_out(GIVEN)
    assert held_out(GIVEN, replace(CONTEXT, split_seed=1)) != held_out(GIVEN)


def test_a_domain_too_small_holds_out_its_lowest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    context = replace(CONTEXT, validation_fraction=1e-6)
    small = [replace(document, domain="small") for document in GIVEN[:3]]
    lowest = min(small, key=lambda d: split_value(d.identity, 0))
    assert held_out(small, context) == {lowest.text}
    assert "lowest hash is held out" in caplog.text
    assert "'small' of 3" in caplog.text


def test_the_last_document_that_could_be_trained_on_is() -> None:
    corpus = build_corpus(GIVEN[:5], replace(CONTEXT, validation_fraction=1 - 1e-9))
    assert len(corpus.train.document_names) == 1
    assert any("highest" in what for what in corpus.left_out)


def test_a_domain_with_nothing_held_out_is_told() -> None:
    corpus = build_corpus([*GIVEN, Document("alone, and not below", "single", "s")], replace(CONTEXT, split_seed=1))
    (told,) = [cause for what, cause in corpus.left_out.items() if "nothing held out" in what]
    assert told["example"] == "'single' of 1"
