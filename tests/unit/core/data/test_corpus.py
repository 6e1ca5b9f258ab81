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
        build_corpus(given, replace(CONTEXT, split_seed=1)),
        build_corpus(given, replace(CONTEXT, validation_fraction=0.5)),
        build_corpus(given, replace(CONTEXT, tokenizer=Other())),
    ]
    assert len({first.fingerprint, *(corpus.fingerprint for corpus in changed)}) == 6
    assert build_corpus(given, replace(CONTEXT, seed=1)).fingerprint == first.fingerprint  # given is what was chosen


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


def test_copies_may_be_kept_but_on_one_side() -> None:
    given = [*documents(), *[Document("same", "a", "copy")] * 4, Document(" SAME", "b", "copy")]
    corpus: Corpus = build_corpus(given, CONTEXT, deduplicate=False)
    parts = [[name for name in s.document_names if "copy" in name] for s in (corpus.train, corpus.validation)]
    assert sorted(map(len, parts)) == [0, 5]
    assert len(set(parts[0] + parts[1])) == 5


def test_names_that_several_documents_have_are_told_apart_by_content() -> None:
    given = [*documents(4), Document("one more", "a", "a/1"), Document("and another", "b", "a/1")]
    corpora = [build_corpus(order, CONTEXT) for order in (given, given[::-1])]
    names = [{*corpus.train.document_names, *corpus.validation.document_names} for corpus in corpora]
    assert names[0] == names[1]
    assert len(names[0]) == 10
    assert {"a/0", "b/1"} < names[0]


def test_what_is_left_out_is_told_in_a_line_with_an_example_where_it_is_one_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = [*documents(), Document(" \n", "a", "blank"), Document(documents()[0].text.upper(), "b", "again")]
    given.append(Document(documents()[1].text.upper(), "b", "once more"))
    corpus = build_corpus(given, CONTEXT)
    told = {what: cause["count"] for what, cause in corpus.left_out.items()}
    assert told == {"documents left out, empty": 1, "documents left out of 22, copies": 2}
    assert caplog.text.count("data: ") == 1
    assert "empty: 1; documents left out of 22, copies: 2 (examples" in caplog.text
    assert corpus.left_out["documents left out of 22, copies"]["example"].startswith("b/")
    caplog.clear()
    build_corpus(given[:-3] + given[-2:], CONTEXT)
    assert caplog.text.count("data: ") == 1
    assert "(first b/" in caplog.text
    assert "deduplicate: false keeps them" in caplog.text
    assert build_corpus(documents(), CONTEXT).left_out == {}  # a context may be used again


def test_that_near_copies_of_long_lines_are_not_looked_for_is_told_where_held_out_text_is_of_them() -> None:
    """Each text has a twin that differs in a word; of those of several lines one stands again as it is."""
    pairs = [(n, word) for n in range(60) for word in ("here", "there")]
    single = [Document(f"{word} " + f"text number {n} says it again; " * 10, "web", f"{n}{word}") for n, word in pairs]
    several = [Document(one.text.replace(";", "\n"), one.domain, one.name) for one in single]
    corpus = build_corpus(single, CONTEXT)
    held_out = len(corpus.validation.document_names)
    told = f"held-out documents of {held_out:,} of one long line, whose near copies are not looked for"
    assert {what: one["count"] for what, one in corpus.left_out.items()} == {told: held_out}
    assert not any("not looked for" in what for what in build_corpus(several, CONTEXT).left_out)


def test_what_utf_8_cannot_hold_is_told() -> None:
    corpus = build_corpus([*documents(), Document("half \ud83d of a face", "a", "x")], CONTEXT)
    assert [what for what in corpus.left_out if "UTF-16" in what]
    assert "half ? of a face" in texts_spelled(corpus)


def test_special_tokens_spelled_in_text_are_told_and_stay_text() -> None:
    corpus = build_corpus([*documents(), Document("a<|endoftext|>b, a<|endoftext|>", "a", "x")], CONTEXT)
    ((what, cause),) = corpus.left_out.items()
    assert "read as text and not as control tokens" in what
    assert (cause["count"], cause["example"]) == (2, "a/x: '<|endoftext|>'")
    assert "a<|endoftext|>b, a<|endoftext|>" in texts_spelled(corpus)


def texts_spelled(corpus: Corpus) -> str:
    return "".join(bytes(s.tokens[s.tokens < 256].astype(np.uint8)).decode() for s in (corpus.train, corpus.validation))
