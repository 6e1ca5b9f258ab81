"""The writer of safetensors: what the library reads, a checksum for each of them, and the umask's mode."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moelab.checksums import checksum
from moelab.tensor_file import write_tensors

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
    torch.float64, torch.int64,
)  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {f"é.{dtype}": (torch.rand(5, 3, generator=generator) * 100).to(dtype) for dtype in DTYPES}
    more = {"z": torch.rand(7, generator=generator), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    return values | more


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_library_reads_from_it_what_it_reads_from_its_own(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(_tensors(), tmp_path / "theirs", metadata=metadata)
    entry = write_tensors(tmp_path / "ours", _tensors(), metadata).entry()
    with safe_open(tmp_path / "ours", "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118  (it is no mapping)
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name
            assert ours.get_tensor(name).dtype == theirs.get_tensor(name).dtype
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    for name, tensor in _tensors().items():
        assert entry["tensors"][name]["offset"] % tensor.element_size() == 0, "aligned for who maps the file"


def test_every_byte_is_covered_by_one_checksum(tmp_path: Path) -> None:
    tensors = _tensors()
    entry = write_tensors(tmp_path / "file", tensors).entry()
    content = (tmp_path / "file").read_bytes()
    end = entry["header"]["bytes"]
    assert entry["header"]["checksum"] == checksum(content[:end])
    for name, said in sorted(entry["tensors"].items(), key=lambda item: (item[1]["offset"], item[1]["bytes"])):
        assert said["offset"] == end
        end += said["bytes"]
        assert said["checksum"] == checksum(content[said["offset"] : end])
        assert said["checksum"] == checksum(tensors[name].reshape(-1).view(torch.uint8).numpy())
        assert said["shape"] == list(tensors[name].shape)
    assert end == len(content) == entry["bytes"]


def test_strides_and_shared_memory_are_written_in_full(tmp_path: Path) -> None:
    bank = torch.arange(24.0).view(2, 3, 4)
    tensors = {"turned": bank.transpose(1, 2), "cut": bank[1, :, 1:3], "bank": bank}
    write_tensors(tmp_path / "file", tensors)
    for name, found in load_file(tmp_path / "file").items():
        assert torch.equal(found, tensors[name]), name


def test_a_type_that_has_no_name_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such type: wave \(torch.complex64\)"):
        write_tensors(tmp_path / "file", {"wave": torch.zeros(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "file", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
