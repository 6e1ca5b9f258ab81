"""Documents through pyarrow and `datasets`: the same as from JSON lines, and bad files named by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelab import ConfigError, Corpus, DataContext, DataError, Places, Registry
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hookspecs import DATA_SOURCES

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'moelab[parquet]'")
files = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'moelab[parquet]'")

ROWS = [{"text": f"Text {n} é, and {n * n}", "from": "ab"[n % 2], "id": n} for n in range(600)]
KEYS = {"domain_key": "from", "id_key": "id"}


def build(base: Path, name: str, **options: Any) -> Corpus:
    context = DataContext(ByteTokenizer(), validation_fraction=0.5, places=Places(search=(base,)))
    return Registry(entry_points=False).build(DATA_SOURCES, {"name": name, **options}, context, "data.source")


def names(corpus: Corpus) -> set[str]:
    return {*corpus.train.document_names, *corpus.validation.document_names}


@pytest.fixture
def plain(tmp_path: Path) -> Corpus:
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return build(tmp_path, "jsonl", paths=["some.jsonl"], **KEYS)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    files.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


def test_parquet_gives_the_corpus_of_json_lines(tmp_path: Path, plain: Corpus) -> None:
    write_parquet(tmp_path / "some.parquet", ROWS)
    corpus = build(tmp_path, "parquet", paths=["some.parquet"], **KEYS)
    assert (corpus.fingerprint, names(corpus)) == (plain.fingerprint, names(plain))
    unnamed = build(tmp_path, "parquet", paths=["."])
    assert unnamed.domains == ["some"] and "some.parquet:600" in names(unnamed)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "some.parquet", ROWS)
    with pytest.raises(
        DataError, match=r"some\.parquet has no column 'content'. It has: text, from, id; set data.*text_key"
    ):
        build(tmp_path, "parquet", paths=["some.parquet"], text_key="content")


def test_a_row_without_text_and_a_false_or_cut_file_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "some.parquet", [*ROWS[:3], {"text": None}, *ROWS[3:]])
    with pytest.raises(DataError, match=r"some\.parquet: row 4 has no string 'text', but null"):
        build(tmp_path, "parquet", paths=["some.parquet"])
    left_out = build(tmp_path, "parquet", paths=["some.parquet"], skip_bad=True).left_out
    assert left_out["records left out, without a text 'text'"]["count"] == 1
    whole = (tmp_path / "some.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"no parquet at all", whole[:200] + b"x" * 800 + whole[1000:]):
        (tmp_path / "some.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"some\.parquet can't be read after row \d+"):
            build(tmp_path, "parquet", paths=["some.parquet"])


def test_bytes_that_are_no_utf8_are_no_text(tmp_path: Path) -> None:
    binary = pyarrow.array([b"caf\xe9"] + [row["text"].encode() for row in ROWS], pyarrow.binary())
    lying = pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())
    files.write_table(pyarrow.table({"text": lying}), tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"row 1 has no string 'text'"):
        build(tmp_path, "parquet", paths=["some.parquet"])
    assert len(names(build(tmp_path, "parquet", paths=["some.parquet"], skip_bad=True))) == 600


def test_zstd_gives_the_corpus_of_plain_lines_and_a_cut_file_is_named(tmp_path: Path, plain: Corpus) -> None:
    content = (tmp_path / "some.jsonl").read_bytes()
    codec = pyarrow.Codec("zstd")
    pieces = [codec.compress(part, asbytes=True) for part in (content[:9000], content[9000:])]  # two frames
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped/some.jsonl.zst").write_bytes(b"".join(pieces))
    corpus = build(tmp_path, "jsonl", paths=["zipped"], **KEYS)
    assert (corpus.fingerprint, names(corpus)) == (plain.fingerprint, names(plain))
    (tmp_path / "zipped/some.jsonl.zst").write_bytes(b"".join(pieces)[:-20])
    with pytest.raises(DataError, match=r"some\.jsonl\.zst can't be read after line \d+: Truncated"):
        build(tmp_path, "jsonl", paths=["zipped"])
    (tmp_path / "zipped/some.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(DataError, match=r"some\.jsonl\.zst can't be read after line 0"):
        build(tmp_path, "jsonl", paths=["zipped"])


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "some.parquet", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow, .* pip install 'moelab\[parquet\]'"):
        build(tmp_path, "parquet", paths=["some.parquet"])


def test_a_saved_dataset_gives_the_corpus_of_json_lines(tmp_path: Path, plain: Corpus) -> None:
    library = pytest.importorskip("datasets", reason="needs datasets: pip install 'moelab[datasets]'")
    table = library.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    corpus = build(tmp_path, "datasets", paths=["one"], **KEYS)
    assert (corpus.fingerprint, names(corpus)) == (plain.fingerprint, names(plain))
    library.DatasetDict(train=table.select(range(500)), test=table.select(range(500, 600))).save_to_disk(
        str(tmp_path / "two")
    )
    assert build(tmp_path, "datasets", paths=["two"]).domains == ["test", "train"]
    few = build(tmp_path, "datasets", paths=["two"], split="test", id_key="id")
    assert names(few) == {str(n) for n in range(500, 600)}
    for options, said in (
        ({"split": "dev"}, "no split 'dev'; it has: train, test"),
        ({"text_key": "body"}, "no column"),
    ):
        with pytest.raises(DataError, match=said):
            build(tmp_path, "datasets", paths=["two"], **options)
    (tmp_path / "three").mkdir()
    with pytest.raises(DataError, match="three can't be read as a saved dataset"):
        build(tmp_path, "datasets", paths=["three"])
