"""A user's text files: where documents, domains and names come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moelab import ConfigError, Corpus, DataContext, DataError, Places, Registry
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hookspecs import DATA_SOURCES

FILES = ("novels/a.txt", "novels/deep/b.txt", "poems/c.txt", "poems/d.md", "top.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"The text of {name}.")
    return tmp_path


def build(base: Path, **options: Any) -> Corpus:
    context = DataContext(ByteTokenizer(), validation_fraction=0.5, places=Places(search=(base,)))
    return Registry(entry_points=False).build(DATA_SOURCES, {"name": "text", **options}, context, "data.source")


def names(corpus: Corpus) -> set[str]:
    return {*corpus.train.document_names, *corpus.validation.document_names}


def documents(corpus: Corpus) -> dict[str, int]:
    return {domain: corpus.manifest[domain]["documents"] for domain in corpus.domains}


def test_subfolders_are_domains_and_names_hold_no_absolute_path(folder: Path) -> None:
    corpus = build(folder, paths=["library"])
    assert documents(corpus) == {"library": 1, "novels": 2, "poems": 2}
    assert names(corpus) == {f"library/{name}" for name in FILES}


def test_domains_may_be_named(folder: Path) -> None:
    corpus = build(folder, domains={"prose": ["library/novels", "library/top.txt"], "verse": ["library/poems/*"]})
    assert documents(corpus) == {"prose": 3, "verse": 2}


def test_a_pattern_chooses_among_a_folders_files(folder: Path) -> None:
    assert names(build(folder, paths=["library"], pattern="**/*.txt")) == {
        f"library/{name}" for name in FILES if name.endswith(".txt")
    }


def test_a_file_named_twice_is_read_once(folder: Path) -> None:
    assert documents(build(folder, paths=["library/novels/a.txt", "library"], deduplicate=False))["novels"] == 2


def test_the_config_folder_does_not_matter_to_the_fingerprint(folder: Path) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    first = build(moved, paths=["library"])
    assert build(moved / "library", paths=[str(moved / "library")]).fingerprint == first.fingerprint


def test_a_separator_cuts_one_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("one<|endoftext|>two<|endoftext|>\n<|endoftext|>three")
    with pytest.raises(DataError, match="separator"):
        build(tmp_path, paths=["all.txt"])
    corpus = build(tmp_path, paths=["all.txt"], separator="<|endoftext|>")
    assert documents(corpus) == {tmp_path.name: 3}


def test_a_binary_file_is_named_with_the_cure(folder: Path) -> None:
    (folder / "library" / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(DataError, match=r"cover\.png is binary.*\*\.txt"):
        build(folder, paths=["library"])


def test_empty_files_are_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no document with any text"):
        build(tmp_path, paths=["empty.txt"])


def test_no_paths_and_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source \('text'.*nothing to read"):
        build(tmp_path)
    with pytest.raises(DataError, match="no file or folder 'nowhere'"):
        build(tmp_path, paths=["nowhere"])
    with pytest.raises(ConfigError, match="separator"):
        build(tmp_path, paths=["x"], separator="")
