"""Where files are looked for, and what is no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.data.reading import read_text, resolve_files, resolve_path
from moelab.errors import DataError


def test_a_path_is_looked_for_beside_the_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, here = tmp_path / "base", tmp_path / "here"
    for folder in (base, here):
        folder.mkdir()
        (folder / "both.txt").write_text("x")
    (here / "one.txt").write_text("x")
    monkeypatch.chdir(here)
    assert resolve_path("both.txt", base) == base / "both.txt"
    assert resolve_path("one.txt", base) == here / "one.txt"
    assert resolve_path(str(here / "both.txt"), base) == here / "both.txt"
    assert resolve_files("one*.txt", base)[1] == [here / "one.txt"]
    with pytest.raises(DataError, match=r"no file or folder 'none\.txt'.*base.*here"):
        resolve_path("none.txt", base)


def test_folders_and_globs_are_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", "a/.hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert resolve_files(".", tmp_path)[1] == [tmp_path / "a/c.md", tmp_path / "b.txt"]
    root, files = resolve_files("a/*.md", tmp_path)
    assert (root, files) == (tmp_path / "a", [tmp_path / "a/c.md"])
    assert resolve_files("b.txt", tmp_path) == (tmp_path, [tmp_path / "b.txt"])
    with pytest.raises(DataError, match=r"no file matches '\*\.rst'"):
        resolve_files("*.rst", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x7fELF\0\1", "is binary"), ("text".encode("utf-16"), "binary.*UTF-16"), (b"caf\xe9", "not UTF-8.*iconv")],
)
def test_what_is_no_text_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "input.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"input\.bin.*{message}"):
        read_text(path)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "bom.txt") == "hello"
