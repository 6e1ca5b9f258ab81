"""Writes one safetensors file from memory, tensor by tensor, and says the checksum of each.

The format: 8 bytes of header length, little endian, as much JSON, then the tensors' little-endian bytes in C order,
contiguous (huggingface/safetensors README, "Format"). The library's own writer gives the same bytes, but mode 600
whatever the umask, and no checksums. Here each piece is hashed and then written while it still lies in the
processor's cache: the hash fetches what the write would have to fetch, so that it costs next to nothing
(benchmarks/checksums.py). Tensors of an accelerator come to the host one at a time.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.checksums import running

# In the order in which the library lays tensors out (its enum Dtype is to rise in alignment, the file falls): what is
# aligned most comes first, then by name.
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PIECE = 512 << 10  # bytes: stays in the second-level cache between the hash and the write
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}  # by the names of safetensors


@dataclass(frozen=True)
class Made:
    """A tensor that is made when it is its turn, so that of a file that is written one is in memory at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # of this shape and type

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as it lies in its file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int
    checksum: str


@dataclass(frozen=True)
class WrittenFile:
    """A safetensors file: its header, and behind it the tensors without a gap, so that no byte is left out."""

    header_bytes: int  # with the 8 of its length
    header_checksum: str
    tensors: Mapping[str, WrittenTensor]

    def entry(self) -> dict[str, Any]:
        """What a manifest says of it (`moelab.manifest`)."""
        tensors = {
            name: {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "offset": t.offset,
                "bytes": t.nbytes,
                "checksum": t.checksum,
            }
            for name, t in self.tensors.items()
        }
        total = self.header_bytes + sum(tensor.nbytes for tensor in self.tensors.values())
        header = {"bytes": self.header_bytes, "checksum": self.header_checksum}
        return {"bytes": total, "header": header, "tensors": tensors}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Made], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """A new file with the mode that the umask gives; not synced. Raises OSError; ValueError for a dtype without a name.

    The tensors may lie in any strides, on any device, and share memory: each is written in full.
    """
    unknown = sorted(f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _NAMES)
    if unknown:
        raise ValueError(f"safetensors has no such type: {', '.join(unknown[:3])}")
    order = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    header = _header(order, tensors, metadata)
    written: dict[str, WrittenTensor] = {}
    offset = len(header)
    with path.open("wb", buffering=0) as file:
        header_checksum = _write(file.fileno(), memoryview(header))
        for name in order:
            asked = tensors[name]
            tensor = asked.make() if isinstance(asked, Made) else asked
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(asked.shape), asked.dtype), (
                f"{name} is of another form"
            )
            data = _little_endian_bytes(tensor)
            digest = _write(file.fileno(), data)
            written[name] = WrittenTensor(_NAMES[tensor.dtype], tuple(tensor.shape), offset, len(data), digest)
            offset += len(data)
    return WrittenFile(len(header), header_checksum, written)


def _header(order: list[str], tensors: Mapping[str, Tensor | Made], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _little_endian_bytes(tensor: Tensor) -> memoryview:
    """The memory of the tensor itself where it lies contiguous on the host of a little-endian machine."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        flat = flat.reshape(-1, tensor.element_size()).flip(1).reshape(-1)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write(descriptor: int, data: memoryview) -> str:
    """All of it; -> its checksum."""
    digest = running()
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        digest.update(piece)
        while len(piece):
            piece = piece[os.write(descriptor, piece) :]
    return digest.hexdigest()
