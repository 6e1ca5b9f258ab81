"""The manifest of a checkpoint: a bit that flips is noticed; what a stranger writes reaches no other file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab.checksums import checksum
from moelab.errors import CheckpointError
from moelab.manifest import MANIFEST, differences, manifest_bytes, plain_entry, read_manifest, unlisted
from moelab.tensor_file import write_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of tensors, as a checkpoint in shards would have, and one of text."""
    entries = {"config.yaml": plain_entry(b"a: 1\n"), "empty": plain_entry(b"")}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        entries[name] = write_tensors(tmp_path / name, {"a": torch.rand(3), "b.c": torch.rand(2, 2)}).entry()
    (tmp_path / "config.yaml").write_bytes(b"a: 1\n")
    (tmp_path / "empty").touch()
    (tmp_path / MANIFEST).write_bytes(manifest_bytes(entries))
    return tmp_path


def _problems(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return list(differences(folder, manifest))


def test_a_folder_as_it_was_written_has_no_difference(folder: Path) -> None:
    read: list[int] = []
    manifest = read_manifest(folder)
    assert manifest is not None
    assert not list(differences(folder, manifest, read.append))
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    assert sum(read) == manifest.nbytes == sum(path.stat().st_size for path in files)
    assert manifest.tensors == 4
    assert not unlisted(folder, manifest)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 40])
def test_shares_are_read_once_and_say_together_what_one_says(folder: Path, of: int) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    second = folder / "model-00002-of-00002.safetensors"
    content = bytearray(second.read_bytes())
    content[3] ^= 1
    content[-1] ^= 1
    second.write_bytes(content)
    (folder / "config.yaml").write_bytes(b"a: 2\n")
    (folder / "empty").unlink()
    read: list[int] = []
    found = [problem for which in range(of) for problem in differences(folder, manifest, read.append, (which, of))]
    assert found == _problems(folder)
    assert len(found) == 4
    assert sum(read) == manifest.nbytes
    short = content[:-1]
    second.write_bytes(short)  # which whoever has a part of it says
    found = [problem for which in range(of) for problem in differences(folder, manifest, share=(which, of))]
    assert list(dict.fromkeys(found)) == _problems(folder)


def test_a_bit_of_every_byte_of_every_file_is_covered_and_its_place_named(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for byte in range(len(whole)):
            changed = bytearray(whole)
            changed[byte] ^= 1 << byte * 5 % 8
            path.write_bytes(changed)
            if path.name == MANIFEST:
                with pytest.raises(CheckpointError, match=MANIFEST):
                    read_manifest(folder)
            else:
                [problem] = _problems(folder)
                assert problem.startswith(f"{path.name}: ")
                assert problem.endswith("was changed after it was written")
                if "model" in path.name and byte >= len(whole) - 28:
                    assert problem.split(": ")[1].split()[0] == ("a" if byte < len(whole) - 16 else "b.c")
        path.write_bytes(whole)
    assert not _problems(folder)


def test_what_is_missing_cut_longer_or_a_folder_is_told(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"a: 1\n\n")
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    first, second = sorted(folder.glob("model*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = _problems(folder)
    assert [problem.split(":")[0] for problem in found] == ["config.yaml", "empty", first.name, second.name]
    for problem, word in zip(found, ("6 bytes, 5 were written", "", "is missing", "bytes"), strict=True):
        assert word in problem


def test_what_was_added_is_told(folder: Path) -> None:
    (folder / "chat_template.jinja").touch()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert unlisted(folder, manifest) == ["chat_template.jinja"]


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def _renamed(files: dict[str, Any]) -> None:
    files["../secret"] = files.pop("config.yaml")


def _gap(files: dict[str, Any]) -> None:
    files["model-00001-of-00002.safetensors"]["tensors"].pop("a")


def _overlap(files: dict[str, Any]) -> None:
    files["model-00001-of-00002.safetensors"]["tensors"]["a"]["offset"] -= 4


def _negative(files: dict[str, Any]) -> None:
    files["model-00001-of-00002.safetensors"]["tensors"]["a"]["bytes"] = -12


def _text(files: dict[str, Any]) -> None:
    files["config.yaml"]["bytes"] = "5"


@pytest.mark.parametrize("change", [_renamed, _gap, _overlap, _negative, _text])
def test_one_that_is_signed_and_says_what_none_of_ours_says_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """Its checksum is right: whoever wrote it computed it."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    change(files)
    (folder / MANIFEST).write_bytes(manifest_bytes(files))
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(folder)


def test_one_of_a_later_format_is_refused(folder: Path) -> None:
    said = json.loads((folder / MANIFEST).read_bytes())
    del said["checksum"]
    said["format_version"] = 2
    body = json.dumps(said, indent=1)
    said["checksum"] = checksum(body.encode())
    (folder / MANIFEST).write_text(json.dumps(said, indent=1) + "\n")
    with pytest.raises(CheckpointError, match="another format"):
        read_manifest(folder)
