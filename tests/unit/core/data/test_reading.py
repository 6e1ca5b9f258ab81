"""Where files are looked for, and what is no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelab.data.account import Account
from moelab.data.reading import distinct_files, read_text, resolve_files, resolve_path
from moelab.errors import DataError, UserError
from moelab.paths import Places


def at(folder: Path) -> Places:
    """Beside a config in this folder."""
    return Places(search=(folder,))


def test_a_path_is_looked_for_beside_the_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, here = tmp_path / "base", tmp_path / "here"
    for folder in (base, here):
        folder.mkdir()
        (folder / "both.txt").write_text("x")
    (here / "one.txt").write_text("x")
    monkeypatch.chdir(here)
    assert resolve_path("both.txt", at(base)) == base / "both.txt"
    assert resolve_path("one.txt", at(base)) == here / "one.txt"
    assert resolve_path(str(here / "both.txt"), at(base)) == here / "both.txt"
    assert resolve_files("one*.txt", at(base))[1] == [here / "one.txt"]
    with pytest.raises(DataError, match=r"no file or folder 'none\.txt'.*base.*here"):
        resolve_path("none.txt", at(base))


def test_folders_and_globs_are_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", "a/.hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert resolve_files(".", at(tmp_path))[1] == [tmp_path / "a/c.md", tmp_path / "b.txt"]
    root, files = resolve_files("a/*.md", at(tmp_path))
    assert (root, files) == (tmp_path / "a", [tmp_path / "a/c.md"])
    assert resolve_files("b.txt", at(tmp_path)) == (tmp_path, [tmp_path / "b.txt"])
    with pytest.raises(DataError, match=r"no file matches '\*\.rst'"):
        resolve_files("*.rst", at(tmp_path))


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def found(path: str, base: Path, *patterns: str) -> tuple[list[str], dict[str, int]]:
    """(names below the folder that was searched, {cause: count})."""
    account = Account()
    root, files = resolve_files(path, at(base), patterns or ("**/*",), account)
    return [file.relative_to(root).as_posix() for file in files], {w: c.count for w, c in account.causes.items()}


@pytest.mark.parametrize("name", ["a[1].txt", "[a]/b.txt", "what?.txt", "star*.txt"])
def test_a_name_that_exists_is_no_pattern(name: str, tmp_path: Path) -> None:
    made(tmp_path, name, "a1.txt", "a/b.txt", "whatx.txt", "starx.txt")
    assert resolve_files(name, at(tmp_path)) == ((tmp_path / name).parent, [tmp_path / name])
    folder = str(Path(name).parent)
    assert (tmp_path / name).name in found(folder, tmp_path)[0] or folder == "."


def test_brackets_of_a_folder_may_stand_before_a_pattern(tmp_path: Path) -> None:
    made(tmp_path, "run[1]/a.txt", "run[1]/b.md", "run1/c.txt", "part[2].txt", "part2.txt")
    assert found("run[1]/*.txt", tmp_path)[0] == ["a.txt"]
    assert found("*[1]/*.txt", tmp_path)[0] == ["run1/c.txt", "run[1]/a.txt"]  # as pattern and as spelled
    assert found("part[12].txt", tmp_path)[0] == ["part2.txt"]


def test_what_a_folder_holds_and_is_not_read_is_counted(tmp_path: Path) -> None:
    made(tmp_path, "a.md", "b.txt", "c.TXT", ".hidden", ".git/x", "deep/d.txt")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    assert found(".", tmp_path, "**/*.txt") == (
        ["b.txt", "deep/d.txt"],
        {
            "files left out, hidden by a dot": 2,
            "files left out, not '**/*.txt'": 2,
            "files left out, links to nowhere": 1,
        },
    )
    assert found("*.txt", tmp_path)[1].keys() == {"files left out, hidden by a dot", "files left out, links to nowhere"}
    assert "folders left out, '*' names files" in found("*", tmp_path)[1]


def test_links_keep_their_names_and_linked_folders_are_searched_once(tmp_path: Path) -> None:
    made(tmp_path, "blobs/0123", "other/x.txt")
    made(tmp_path / "data", "own.txt")
    (tmp_path / "data" / "seen.txt").symlink_to(tmp_path / "blobs" / "0123")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "data")
    assert found("data", tmp_path)[0] == ["more/x.txt", "own.txt", "seen.txt"]


def test_a_file_reached_twice_is_read_once_and_told(tmp_path: Path) -> None:
    made(tmp_path, "data/a.txt", "data/b.txt")
    (tmp_path / "data" / "c.txt").symlink_to(tmp_path / "data" / "a.txt")
    account = Account()
    paths = [(1, "data/b.txt"), (2, "data")]
    read = [(key, file.name) for key, _, file in distinct_files(paths, at(tmp_path), ("**/*",), account)]
    assert read == [(1, "b.txt"), (2, "a.txt")]
    assert {what: cause.count for what, cause in account.causes.items()} == {"files read once, reached twice": 2}


def test_a_name_that_is_too_long_is_said_to_be_no_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no path"):
        resolve_files("x" * 300, at(tmp_path))


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
