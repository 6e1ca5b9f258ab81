"""Whole or not at all, and never absent: files, folders that replace others, and what killed writers leave."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moelab import atomic
from moelab.atomic import discard, exchange, in_bytes, put_in_place, recover, where_it_may_be, write_file


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


@pytest.fixture(params=["as it is", "no exchange"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This system, and one whose file system can't exchange names."""
    if request.param == "no exchange":
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    return str(request.param)


def test_a_file_that_can_not_be_written_leaves_the_old_one_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "x", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x", "new")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_names_are_exchanged_or_it_is_said_that_they_can_not_be(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "other", "2")
    told = exchange(one, other)
    assert ((one / "file").read_text(), (other / "file").read_text()) == (("2", "1") if told else ("1", "2"))
    if not told:
        pytest.skip("this system or file system can't exchange names")
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "nothing")


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "another"])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path, system: str, before: str) -> None:
    target, new = tmp_path / "out", folder(tmp_path / ".out.partial", "new")
    if before == "an empty folder":
        target.mkdir()
    elif before == "another":
        folder(target, "old")
        (target / "more").touch()
    put_in_place(new, target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["file"]
    assert (target / "file").read_text() == "new"


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    target, new = folder(tmp_path / "out", "old"), folder(tmp_path / ".out.partial", "new")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self == new:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(new, target)
    assert (target / "file").read_text() == "old"


def test_killed_between_two_renames_the_old_folder_is_named_to_readers_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where names can't be exchanged."""
    folder(tmp_path / ".out.replaced", "old")
    folder(tmp_path / ".out.partial", "new, whole or not")
    assert ".out.replaced" in where_it_may_be(tmp_path / "out")
    recover(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert "brought back" in caplog.text
    assert "removed .out.partial, 17 bytes that a killed command left" in caplog.text
    assert where_it_may_be(tmp_path / "out") == ""


def test_an_old_folder_that_was_not_deleted_in_time_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "out", "new")
    folder(tmp_path / ".out.replaced", "old")
    recover(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert "removed .out.replaced, 3 bytes" in caplog.text


def test_a_folder_vanishes_from_its_name_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it is deleted, it is not half a folder of that name."""
    target = folder(tmp_path / "step_1", "whole")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # type: ignore[attr-defined]
    discard(target)
    assert names(tmp_path) == [".step_1.partial"]


def test_sizes_are_said_as_a_person_reads_them() -> None:
    assert [in_bytes(size) for size in (12, 4200, 3 * 10**6, 115 * 10**9)] == [
        "12 bytes",
        "4.2 kB",
        "3.0 MB",
        "115.0 GB",
    ]
