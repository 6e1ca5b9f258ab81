"""The streaming writer: whole files or none, in buffers and past the page cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from moelab.errors import CheckpointError
from moelab_upcycling.writer import BUFFER, ShardWriter, write_text


@pytest.mark.parametrize("size", [0, 1, 4096, BUFFER - 1, BUFFER, 2 * BUFFER + 12_345])
def test_what_is_written_in_pieces_is_read_back_whole(tmp_path: Path, size: int):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    writer = ShardWriter(tmp_path / "file", size)
    for start in range(0, size, 3_000_001):
        writer.write(data[start : start + 3_000_001])
    assert not (tmp_path / "file").exists()
    writer.commit()
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_aborted_file_leaves_nothing(tmp_path: Path):
    writer = ShardWriter(tmp_path / "file", 100)
    writer.write(b"half")
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    writer = ShardWriter(tmp_path / "file", 3)
    writer.write(b"new")
    assert (tmp_path / "file").read_text() == "old"
    writer.commit()
    assert (tmp_path / "file").read_text() == "new"


def test_an_error_while_writing_is_explained_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path / "file", 3 * BUFFER)
    monkeypatch.setattr(os, "pwrite", full)
    writer.write(np.zeros(BUFFER, dtype=np.uint8))
    with pytest.raises(CheckpointError, match="no space left; free some"):
        writer.commit()
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_small_file_is_whole_or_absent(tmp_path: Path):
    write_text(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(CheckpointError, match="can't be written"):
        write_text(tmp_path / "no" / "a.json", "{}")
