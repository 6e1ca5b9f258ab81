"""What weights have met: exact counts, a file that says the same when read again, and what can't be known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moelab.data.batches import TrainBatches, ValidationBatches
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import Corpus, DataContext, Document, build_corpus
from moelab.data.identity import text_identity
from moelab.data.seen import RECORD, DataRecord, history_of, read_record, record_of_run, seen_text
from moelab.errors import CheckpointError

TOKENIZER = ByteTokenizer()
CONTEXT = DataContext(TOKENIZER, validation_fraction=0.3)
GIVEN = [Document(f"document {n} has number {n * 7919}", "a", f"d{n}") for n in range(60)]


def record(corpus: Corpus, steps: int = 3) -> DataRecord:
    return record_of_run(corpus, TOKENIZER, TrainBatches(corpus.train, 2, 16, 0).documents_read(steps))


def texts(corpus: Corpus, part: str) -> set[str]:
    by_name = {document.name: document.text for document in GIVEN}
    return {by_name[name] for name in getattr(corpus, part).document_names}


def test_a_record_is_the_same_when_read_again(tmp_path: Path) -> None:
    found = record(build_corpus(GIVEN, CONTEXT)) | DataRecord(unknown=("somebody's weights",))
    (tmp_path / RECORD).write_bytes(found.to_bytes())
    again = read_record(tmp_path)
    assert again is not None
    for part in ("training", "read", "held_out"):
        assert getattr(again, part).keys() == getattr(found, part).keys() == {"text"}
        assert np.array_equal(getattr(again, part)["text"], getattr(found, part)["text"])
    assert (again.fingerprints, again.unknown) == (found.fingerprints, found.unknown)
    assert 0 < len(again.read["text"]) < len(again.training["text"])


def test_a_million_documents_take_eight_bytes_and_three_bits_each() -> None:
    """Base64 makes four characters of three bytes; the read ones take one bit."""
    hashes = np.arange(1_000_000, dtype=np.uint64)
    size = len(DataRecord({"text": hashes}, {"text": hashes[::2]}).to_bytes())
    assert size < 8.125e6 * 4 / 3 + 1000


def test_seen_documents_are_counted_exactly() -> None:
    """Another split of the same text: what the first trains on and the second holds out."""
    first, second = build_corpus(GIVEN, CONTEXT), build_corpus(GIVEN, replace(CONTEXT, split_seed=1))
    scored = np.arange(len(second.validation.document_names)) < 7
    history = record(first, steps=5)
    read = {int(i) for i in history.read["text"]}
    names = second.validation.document_names
    held = [next(document.text for document in GIVEN if document.name == name) for name in names]
    trained = [text in texts(first, "train") for text in held]
    found = seen_text(history, "first", second, TOKENIZER, scored)
    assert (found.held_out, found.held_out_trained) == (len(held), sum(trained))
    assert (found.scored, found.scored_trained) == (7, sum(trained[:7]))
    assert found.scored_read == sum(text_identity(text) in read for text in held[:7])
    assert found.scored_trained > 0
    assert f"{found.scored_trained} of 7 held-out documents" in found.lines()[0]


@pytest.mark.parametrize("part", [GIVEN[:40], GIVEN[20:]])
def test_with_the_same_split_nothing_is_seen_whatever_text_is_chosen(part: list[Document]) -> None:
    corpus = build_corpus(part, replace(CONTEXT, validation_fraction=0.1))
    everything = np.ones(len(corpus.validation.document_names), bool)
    assert seen_text(record(build_corpus(GIVEN, CONTEXT)), "x", corpus, TOKENIZER, everything).lines() == []


def test_another_spelling_of_a_text_is_seen() -> None:
    first = build_corpus(GIVEN, CONTEXT)
    shouted = [replace(document, text=f"\t{document.text.upper()} ") for document in GIVEN]
    second = build_corpus(shouted, replace(CONTEXT, split_seed=1))
    everything = np.ones(len(second.validation.document_names), bool)
    plain = build_corpus(GIVEN, replace(CONTEXT, split_seed=1))
    counts = [seen_text(record(first), "x", c, TOKENIZER, everything).held_out_trained for c in (second, plain)]
    assert counts[0] == counts[1] > 0


def test_ancestors_add_up_and_one_without_a_record_stays_unknown(tmp_path: Path) -> None:
    corpora = [build_corpus(part, CONTEXT) for part in (GIVEN[:30], GIVEN[20:])]
    for number, corpus in enumerate(corpora):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / RECORD).write_bytes(record(corpus).to_bytes())
    (tmp_path / "bare").mkdir()
    both = history_of([tmp_path / "0", tmp_path / "1"])
    expected = {text_identity(text) for corpus in corpora for text in texts(corpus, "train")}
    assert {int(i) for i in both.training["text"]} == expected
    assert both.fingerprints == tuple(corpus.fingerprint for corpus in corpora)
    assert both.unknown == ()
    found = history_of([tmp_path / "0", tmp_path / "bare"], ["ours", "Qwen2-7B"])
    assert found.unknown == ("Qwen2-7B",)
    told = seen_text(
        found, "ours", corpora[0], TOKENIZER, np.ones(1, bool).repeat(len(corpora[0].validation.document_names))
    )
    assert told.held_out_trained == 0
    assert told.lines() == [
        f"held-out text may have been seen: Qwen2-7B keeps no record ({RECORD}) of what it was trained on"
    ]


def test_text_known_by_other_hashes_may_have_been_seen() -> None:
    corpus = build_corpus(GIVEN, CONTEXT)
    bare = replace(
        corpus, train=replace(corpus.train, identities=None), validation=replace(corpus.validation, identities=None)
    )
    assert len(record(bare).training) == 1  # by token ids, for a source that gives no hashes
    everything = np.ones(len(corpus.validation.document_names), bool)
    (line,) = seen_text(record(bare), "theirs", corpus, TOKENIZER, everything).lines()
    assert "may have been seen: theirs" in line
    assert seen_text(record(bare), "theirs", bare, TOKENIZER, everything).lines() == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 2}',
        '{"format_version": 1, "training": {"text": "?"}}',
    ],
)
def test_a_record_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(CheckpointError, match=r"moelab_data\.json"):
        read_record(tmp_path)
    assert read_record(tmp_path / "nowhere") is None


def test_a_record_cut_in_its_bits_is_refused(tmp_path: Path) -> None:
    content = json.loads(record(build_corpus(GIVEN, CONTEXT)).to_bytes())
    content["read"]["text"] = ""
    (tmp_path / RECORD).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"read\.text: .*a bit for each of"):
        read_record(tmp_path)


@pytest.mark.parametrize("sequence_length", range(5, 40))
def test_scored_documents_are_those_with_a_target_in_a_window(sequence_length: int) -> None:
    """A document of which a window reads only the last token, as an input, is not scored: the length decides which."""
    corpus = build_corpus(GIVEN, CONTEXT)
    batches = ValidationBatches(corpus.validation, 4, sequence_length, 2)
    found = np.zeros(len(corpus.validation.document_names), bool)
    for batch in batches:
        assert batch.target_document_id is not None
        found[batch.target_document_id.unique().numpy()] = True
    assert batches.documents_scored().tolist() == found.tolist()
    assert 0 < found.sum() < len(found)


def test_read_documents_are_those_with_a_token_in_a_batch() -> None:
    corpus = build_corpus(GIVEN, CONTEXT)
    batches = TrainBatches(corpus.train, 2, 16, 3)
    found = np.zeros(len(corpus.train.document_names), bool)
    starts = corpus.train.document_starts
    for step in range(60):
        assert batches.documents_read(step).tolist() == found.tolist(), step
        for window in batches.window_ids(step):
            first, last = window * 16, (window + 1) * 16  # the last target stands behind the window
            found |= (starts[:-1] <= last) & (starts[1:] > first)
