"""Documents to streams: nothing lost, nothing in both parts, and the same corpus for the same input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import Corpus, DataContext, Document, TokenStream, build_corpus
from moelab.errors import DataError

CONTEXT = DataContext(ByteTokenizer(), validation_fraction=0.2, seed=0)


def documents(count: int = 10, domains: tuple[str, ...] = ("a", "b")) -> list[Document]:
    return [Document(f"text {n} of {d}: é{n * 7919}", d, f"{d}/{n}") for d in domains for n in range(count)]


def texts(stream: TokenStream) -> list[str]:
    pieces = np.split(stream.tokens, stream.document_starts[1:-1])
    assert all(piece[-1] == 256 for piece in pieces)
    return [ByteTokenizer().decode(piece[:-1]) for piece in pieces]


def test_every_document_comes_back_whole_in_exactly_one_part() -> None:
    given = documents()
    corpus = build_corpus(given, CONTEXT)
    assert sorted(texts(corpus.train) + texts(corpus.validation)) == sorted(d.text for d in given)
    assert not set(corpus.train.document_names) & set(corpus.validation.document_names)
    by_name = {d.name: d for d in given}
    for stream in (corpus.train, corpus.validation):
        assert [by_name[name].text for name in stream.document_names] == texts(stream)
        assert [by_name[name].domain for name in stream.document_names] == [
            corpus.domains[i] for i in stream.document_domain
        ]


def test_each_domain_holds_out_its_fraction_and_at_least_one() -> None:
    corpus = build_corpus([*documents(), *documents(2, ("small",)), *documents(1, ("single",))], CONTEXT)
    held_out = {d: corpus.manifest[d]["validation_documents"] for d in corpus.domains}
    assert held_out == {"a": 2, "b": 2, "small": 1, "single": 0}


def test_training_documents_are_shuffled_across_domains() -> None:
    corpus = build_corpus(documents(50), CONTEXT)
    changes = (np.diff(corpus.train.document_domain) != 0).sum()
    assert changes > 20  # 80 documents in random order change domain about 40 times


def test_the_fingerprint_follows_text_split_and_tokenizer_but_not_the_order_given() -> None:
    given = documents()
    first = build_corpus(given, CONTEXT)
    again = build_corpus(reversed(given), CONTEXT)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.tokens, first.train.tokens)

    class Other(ByteTokenizer):
        fingerprint = "other"

    changed = [
        build_corpus([*given[:-1], replace(given[-1], text="other")], CONTEXT),
        build_corpus([replace(document, domain=f"z{document.domain}") for document in given], CONTEXT),
        build_corpus(given, replace(CONTEXT, seed=1)),
        build_corpus(given, replace(CONTEXT, validation_fraction=0.5)),
        build_corpus(given, replace(CONTEXT, tokenizer=Other())),
    ]
    assert len({first.fingerprint, *(corpus.fingerprint for corpus in changed)}) == 6


def test_the_manifest_counts_what_the_streams_hold() -> None:
    given = documents()
    corpus = build_corpus([*given, given[0]], CONTEXT, sources={"a": {"python": "3"}})
    assert corpus.manifest["a"]["duplicates"] == 1
    assert corpus.manifest["b"]["duplicates"] == 0
    assert corpus.manifest["a"]["sources"] == {"python": "3"}
    assert sum(m["tokens"] for m in corpus.manifest.values()) == len(corpus.train) + len(corpus.validation)
    assert sum(m["bytes"] for m in corpus.manifest.values()) == sum(len(d.text.encode()) for d in given)
    assert sum(m["validation_tokens"] for m in corpus.manifest.values()) == len(corpus.validation)


def test_token_bytes_sum_to_the_text_and_ends_count_none() -> None:
    corpus = build_corpus(documents(), CONTEXT)
    stream = corpus.train
    byte_counts = stream.bytes_of(0, len(stream))
    assert byte_counts is not None
    assert byte_counts.sum() == sum(len(text.encode()) for text in texts(stream))
    assert not byte_counts[stream.document_starts[1:] - 1].any()


def test_positions_know_their_document() -> None:
    stream = TokenStream(np.arange(6), np.array([0, 2, 3, 6]), np.zeros(3, np.int64), ["x", "y", "z"])
    assert stream.document_of(np.arange(6)).tolist() == [0, 0, 1, 2, 2, 2]
    assert stream.bytes_of(0, 2) is None


@pytest.mark.parametrize("given", [[], [Document("", "a", "empty")], [Document(" \n", "a", "blank")] * 3])
def test_an_empty_corpus_is_refused(given: list[Document]) -> None:
    with pytest.raises(DataError, match="no document with any text"):
        build_corpus(given, CONTEXT)


def test_a_single_document_leaves_nothing_to_hold_out() -> None:
    with pytest.raises(DataError, match=r"nothing to hold out.*2 given, 1 kept.*separator"):
        build_corpus([Document("same", "a", "1"), Document("same", "a", "2")], CONTEXT)


def test_a_binary_document_is_named() -> None:
    with pytest.raises(DataError, match=r"picture\.png is binary"):
        build_corpus([*documents(), Document("PNG\0\1", "a", "picture.png")], CONTEXT)


def test_copies_may_be_kept() -> None:
    corpus: Corpus = build_corpus([Document("same", "a", "1")] * 4, CONTEXT, deduplicate=False)
    assert len(corpus.train.document_names) == 3
