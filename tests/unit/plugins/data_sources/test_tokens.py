"""Pre-tokenised files: mapped, split at documents, checked, and measured in bytes where that is known."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab import ConfigError, Corpus, DataContext, DataError, Places, Registry
from moelab.data.batches import ValidationBatches
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.mixed_batches import MixedBatches
from moelab.data.mixing import Mixer, Phase
from moelab.hookspecs import DATA_SOURCES
from moelab_plugins.data_sources import tokens as module

DOCUMENTS = [[*range(n, n + 9), 256] for n in range(10)]
TOKENS = np.concatenate(DOCUMENTS).astype(np.uint16)


def build(base: Path, **options: Any) -> Corpus:
    context = DataContext(ByteTokenizer(), validation_fraction=0.2, places=Places(search=(base,)))
    return Registry(entry_points=False).build(DATA_SOURCES, {"name": "tokens", **options}, context, "data.source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "all.npy", TOKENS)
    TOKENS.astype("<u4").tofile(tmp_path / "all.bin")
    return tmp_path


def test_the_last_documents_are_held_out_and_nothing_is_copied(folder: Path) -> None:
    corpus = build(folder, train="all.npy")
    assert np.array_equal(corpus.train.tokens, TOKENS[:80])
    assert np.array_equal(corpus.validation.tokens, TOKENS[80:])
    assert corpus.train.document_starts.tolist() == list(range(0, 81, 10))
    assert list(corpus.validation.document_names) == ["all.npy#8", "all.npy#9"]
    assert corpus.train.document_names[1:3] == ["all.npy#1", "all.npy#2"]
    assert isinstance(corpus.train.tokens, np.memmap)
    assert corpus.manifest["tokens"]["documents"] == 10
    assert corpus.manifest["tokens"]["validation_tokens"] == 20


def test_raw_and_npy_files_of_the_same_ids_are_the_same_corpus(folder: Path) -> None:
    assert build(folder, train="all.npy").fingerprint == build(folder, train="all.bin", dtype="uint32").fingerprint


def test_a_validation_file_is_taken_as_it_is(folder: Path) -> None:
    np.save(folder / "held_out.npy", TOKENS[:25] + 100 * (TOKENS[:25] < 256))
    corpus = build(folder, train="all.npy", validation="held_out.npy", domain="web")
    assert len(corpus.train) == 100
    assert corpus.validation.document_starts.tolist() == [0, 10, 20, 25]  # the last need not be ended
    assert corpus.domains == ["web"]
    assert corpus.left_out == {}
    assert corpus.fingerprint != build(folder, train="all.npy").fingerprint


def test_held_out_documents_that_are_trained_on_are_dropped_and_told(folder: Path) -> None:
    own = np.array([200, 201, 256, 202], np.uint16)
    np.save(folder / "held_out.npy", np.concatenate([TOKENS[10:20], own[:3], TOKENS[50:59], [256], own[3:]]))
    corpus = build(folder, train="all.npy", validation="held_out.npy")
    assert corpus.validation.tokens.tolist() == own.tolist()
    assert corpus.validation.document_starts.tolist() == [0, 3, 4]
    assert list(corpus.validation.document_names) == ["held_out.npy#1", "held_out.npy#3"]
    ((what, cause),) = corpus.left_out.items()
    assert (what, cause["count"]) == ("held-out documents left out of 4, copies of training documents", 2)
    np.save(folder / "held_out.npy", TOKENS[:20])
    with pytest.raises(DataError, match="every held-out document is a copy"):
        build(folder, train="all.npy", validation="held_out.npy")


def test_documents_that_stand_at_both_ends_of_a_file_are_not_scored(tmp_path: Path) -> None:
    own = [*range(90, 99), 256]
    np.save(tmp_path / "all.npy", np.concatenate([*DOCUMENTS, own, DOCUMENTS[0]]).astype(np.uint16))
    corpus = build(tmp_path, train="all.npy")  # the last two of twelve would be held out
    assert len(corpus.train.document_names) == 10
    assert corpus.validation.tokens.tolist() == own
    assert list(corpus.validation.document_names) == ["all.npy#10"]


def test_an_average_gives_no_document_its_bytes_and_a_vocabulary_does(folder: Path) -> None:
    assert build(folder, train="all.npy").validation.exact_bytes
    assert not build(folder, train="all.npy", bytes_per_token=4.0).validation.exact_bytes


def test_an_end_of_document_of_ones_own_stands_for_no_bytes(folder: Path) -> None:
    np.save(folder / "nul.npy", np.where(TOKENS == 256, 0, TOKENS + 1))
    (batch,) = ValidationBatches(build(folder, train="nul.npy", eos_token_id=0).validation, 1, 19, 1)
    assert batch.target_bytes is not None
    assert batch.target_bytes.sum() == 17


def test_documents_are_found_across_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(folder, train="all.npy").train.document_starts
    monkeypatch.setattr(module, "CHUNK", 7)
    assert np.array_equal(build(folder, train="all.npy").train.document_starts, whole)


def test_the_fingerprint_of_a_long_file_follows_its_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 3)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 80)
    first = build(folder, train="all.npy").fingerprint
    changed = TOKENS.copy()
    changed[0] += 1
    np.save(folder / "changed.npy", changed)
    assert build(folder, train="changed.npy").fingerprint != first
    assert build(folder, train="all.bin", dtype="uint32").fingerprint == first


def test_bytes_come_from_the_tokenizer_or_from_the_user(folder: Path) -> None:
    """100 tokens of which 10 end documents; the first target of the held-out stream is its second token."""
    (batch,) = ValidationBatches(build(folder, train="all.npy").validation, 1, 19, 1)
    assert batch.target_bytes is not None
    assert batch.target_bytes.sum() == 17
    (batch,) = ValidationBatches(build(folder, train="all.npy", bytes_per_token=4.5).validation, 1, 19, 1)
    assert batch.target_bytes is not None
    assert batch.target_bytes.sum() == 17 * 4.5


def test_an_eos_of_ones_own_separates_documents(folder: Path) -> None:
    np.save(folder / "nul.npy", np.where(TOKENS == 256, 0, TOKENS + 1))
    with pytest.raises(DataError, match="one document"):
        build(folder, train="nul.npy", eos_token_id=255)
    corpus = build(folder, train="nul.npy", eos_token_id=0)
    assert len(corpus.train.document_names) == 8


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 300, 256]), r"ids 1 \.\. 300.*has 257.*data\.tokenizer"),
        (np.array([-1, 3]), r"ids -1 \.\. 3"),
        (np.zeros(0, np.int64), "no tokens"),
        (np.zeros((2, 2), np.int64), "one row of integers"),
        (np.zeros(4), "float64"),
        (np.array([5, 6, 256]), "one document"),
    ],
)
def test_a_bad_array_is_refused_by_name(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(DataError, match=rf"bad\.npy.*{message}"):
        build(tmp_path, train="bad.npy")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"bad\.npy"):
        build(tmp_path, train="bad.npy")


def test_raw_files_need_a_type_that_fits(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype: .*all\.bin is raw binary"):
        build(folder, train="all.bin")
    with pytest.raises(ConfigError, match="dtype: must be uint16"):
        build(folder, train="all.bin", dtype="float32")
    (folder / "odd.bin").write_bytes(b"\1\0\2")
    with pytest.raises(DataError, match=r"odd\.bin: has 3 bytes"):
        build(folder, train="odd.bin", dtype="uint16")
    (folder / "none.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"none\.bin has no tokens"):
        build(folder, train="none.bin", dtype="uint16")
    (folder / "cut.npy").write_bytes((folder / "all.npy").read_bytes()[:150])
    with pytest.raises(DataError, match=r"cut\.npy"):
        build(folder, train="cut.npy")


def write_megatron(base: Path, documents: list[list[int]], code: int = 8, per_sequence: int = 4) -> None:
    """As megatron/core/datasets/indexed_dataset.py: _IndexWriter writes; documents of several sequences each."""
    pieces = [[one[at : at + per_sequence] for at in range(0, len(one), per_sequence)] for one in documents]
    lengths = [len(piece) for one in pieces for piece in one]
    kind = {8: "<u2", 4: "<i4"}[code]
    base.with_suffix(".bin").write_bytes(np.array([token for one in documents for token in one], kind).tobytes())
    pointers = np.cumsum([0, *lengths[:-1]]) * np.dtype(kind).itemsize
    first = np.cumsum([0, *map(len, pieces)])
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(first))
    arrays = (np.array(lengths, "<i4"), pointers.astype("<i8"), first.astype("<i8"))
    base.with_suffix(".idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


def write_datatrove(file: Path, documents: list[list[int]], kind: str = "<u2") -> None:
    file.write_bytes(np.array([token for one in documents for token in one], kind).tobytes())
    Path(f"{file}.index").write_bytes(np.cumsum([len(one) for one in documents]).astype("<u8").tobytes())
    Path(f"{file}.metadata").write_text("gpt2|2\n100\n100 T")


@pytest.mark.parametrize("code", [8, 4])
def test_megatron_files_are_read_by_their_index(code: int, tmp_path: Path) -> None:
    bare = [one[:-1] for one in DOCUMENTS]  # without an end of document among the tokens
    write_megatron(tmp_path / "web_document", bare, code)
    corpus = build(tmp_path, train="web_document.bin")
    assert np.array_equal(corpus.train.tokens, np.concatenate(bare[:8]))
    assert corpus.train.document_starts.tolist() == list(range(0, 73, 9))
    assert isinstance(corpus.train.tokens, np.memmap)


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_datatrove_files_are_read_by_their_index(kind: str, tmp_path: Path) -> None:
    write_datatrove(tmp_path / "000_web.ds", [one[:-1] for one in DOCUMENTS], kind)
    assert build(tmp_path, train="000_web.ds").train.document_starts.tolist() == list(range(0, 73, 9))


def test_npy_without_numpys_header_is_raw_as_olmo_has_it(folder: Path) -> None:
    (folder / "part-0.npy").write_bytes(TOKENS.astype("<u2").tobytes())
    expected = build(folder, train="all.npy")
    assert build(folder, train="part-0.npy", dtype="uint16").fingerprint == expected.fingerprint
    assert build(folder, train="all.npy", dtype="uint32").fingerprint == expected.fingerprint  # its header says it
    with pytest.raises(DataError, match=r"part-0\.npy: is no \.npy array"):
        build(folder, train="part-0.npy")


def test_files_of_several_domains_are_one_corpus_that_tells_them_apart(tmp_path: Path) -> None:
    documents = [[1000 * n % 251 + k for k in range(n + 2)] + [256] for n in range(30)]
    for name, mine in (("a/0", documents[:10]), ("a/1", documents[10:20])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_datatrove(tmp_path / f"{name}.ds", mine)
    write_megatron(tmp_path / "code", documents[20:], 4)
    corpus = build(tmp_path, domains={"web": ["a"], "code": ["code.bin"]})
    assert corpus.domains == ["code", "web"] and corpus.left_out == {}
    found = {}
    for stream in (corpus.train, corpus.validation):
        for n, name in enumerate(stream.document_names):
            begin, end = stream.document_starts[n : n + 2]
            found[corpus.domains[stream.document_domain[n]], name] = stream.tokens[begin:end].tolist()
    expected = {("web", f"{n // 10}.ds#{n % 10}"): documents[n] for n in range(20)}
    assert found == expected | {("code", f"code.bin#{n}"): documents[20 + n] for n in range(10)}
    assert {corpus.domains[n] for n in corpus.validation.document_domain} == {"code", "web"}
    tokens = {name: told["tokens"] for name, told in corpus.manifest.items()}
    assert tokens == {"web": sum(map(len, documents[:20])), "code": sum(map(len, documents[20:]))}
    batch = MixedBatches(corpus.train, corpus.domains, Mixer([Phase({"code": 1, "web": 1})]), 4, 8, 0).batch(3)
    assert batch.domain_id[:, 0].bincount().tolist() == [2, 2]
    assert corpus.fingerprint != build(tmp_path, domains={"code": ["a"], "web": ["code.bin"]}).fingerprint


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("web.idx", lambda content: content[:30], r"web\.idx: has 30 bytes, too few"),
        ("web.idx", lambda content: content[:80], r"web\.idx: is cut short: it speaks of 30 sequences"),
        ("web.idx", lambda content: content[:17] + b"\x06" + content[18:], "of version 1 and type 6"),
        ("web.idx", lambda content: content[:18] + b"\xff" * 8 + content[26:], "is cut short"),
        ("web.bin", lambda content: content[:-2], r"web\.bin: has 99 tokens, and its index speaks of 100"),
        ("web.idx", lambda content: content[:154] + b"\1" + content[155:], "in another order"),
        ("web.idx", lambda content: content[:-8] + b"\xff" * 8, "documents whose sequences don't rise"),
        ("x.ds", lambda content: content[:-2], r"x\.ds: has 198 bytes, and its index ends at token 100"),
        ("x.ds.index", lambda content: content[:-3], r"no whole number of uint64s"),
        ("x.ds.index", lambda content: b"", r"its index ends at token 0"),
    ],
)
def test_a_damaged_index_or_file_is_named(name: str, change: Any, said: str, tmp_path: Path) -> None:
    write_megatron(tmp_path / "web", DOCUMENTS)
    write_datatrove(tmp_path / "x.ds", DOCUMENTS)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=said):
        build(tmp_path, train="web.bin" if name.startswith("web") else "x.ds")


def test_one_file_or_domains_and_not_both(folder: Path) -> None:
    for options in ({}, {"train": "all.npy", "domains": {"a": ["all.npy"]}}):
        with pytest.raises(ConfigError, match="and not both"):
            build(folder, **options)
