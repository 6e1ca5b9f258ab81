"""A dense checkpoint read as bytes: headers parsed here, data by pread, the page cache left as it was.

safetensors' own reader maps the file: on a cold 15 GB source its page faults cost five times the read itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.errors import CheckpointError
from moelab_upcycling.dtypes import STORAGE, all_finite, raw_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PIECE = 8 << 20  # bytes read at a time
_MAX_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. CheckpointError where it is cut short or no such file at all."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path}: no safetensors file, or cut short ({size} bytes); download it again")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is the checkpoint complete?") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no safetensors file: its header is no JSON; download it again") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path}: cut short: '{name}' ends at byte {8 + length + end}, the file has {size}; download it again"
            )
        if dtype in _ITEM and end - begin != _ITEM[dtype] * math.prod(shape):
            raise CheckpointError(f"{path}: '{name}' {list(shape)} {dtype} can't have {end - begin} bytes")
        tensors[name] = StoredTensor(name, dtype, shape, path, 8 + length + begin, end - begin)
    return tensors


class DenseSource:
    """All tensors of a checkpoint folder, sharded or not. Picklable before the first read; close() after the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = _find(folder)
        self._open: dict[Path, int] = {}

    def __enter__(self) -> DenseSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def pieces(self, name: str, rows: int | None = None) -> Iterator[npt.NDArray[Any]]:
        """The first `rows` rows of a tensor, a few MB at a time -> [r, row size] in storage type.

        A yielded piece is overwritten by the next. CheckpointError where a value is NaN or infinite.
        """
        tensor = self.tensors[name]
        count = tensor.shape[0] if tensor.shape else 1
        count = count if rows is None else min(rows, count)
        step = _rows_at_a_time(tensor)
        buffer = np.empty((min(step, count), math.prod(tensor.shape[1:])), dtype=STORAGE[tensor.dtype])
        for start in range(0, count, step):
            piece = buffer[: min(step, count - start)]
            self._read_rows(tensor, start, piece)
            yield piece

    def array(self, name: str, rows: int | None = None) -> npt.NDArray[Any]:
        """A whole tensor (or its first rows) in its own shape and storage type."""
        tensor = self.tensors[name]
        shape = tensor.shape if rows is None else (min(rows, tensor.shape[0]), *tensor.shape[1:])
        out = np.empty(shape, dtype=STORAGE[tensor.dtype])
        flat = out.reshape(shape[0] if shape else 1, -1)
        step = _rows_at_a_time(tensor)
        for start in range(0, len(flat), step):
            self._read_rows(tensor, start, flat[start : start + step])
        return out

    def transposed(self, name: str) -> npt.NDArray[Any]:
        """A matrix [D, F] as [F, D], without holding it twice."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape[::-1], dtype=STORAGE[tensor.dtype])
        start = 0
        for piece in self.pieces(name):
            transpose_into(piece, out[:, start : start + len(piece)])
            start += len(piece)
        return out

    def gathered(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Some rows of a matrix -> [len(rows), width] in storage type."""
        tensor = self.tensors[name]
        out = np.empty((len(rows), *tensor.shape[1:]), dtype=STORAGE[tensor.dtype])
        for place, row in enumerate(rows):
            self._read_into(tensor, int(row) * out[0].nbytes, out[place])
        return out

    def fingerprint(self) -> str:
        """A hash of every tensor's name, type, shape and a few kB of its bytes; how it is sharded does not matter."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            size = min(4096, tensor.nbytes)
            for offset in (0, (tensor.nbytes - size) // 2, tensor.nbytes - size):
                sample = np.empty(size, dtype=np.uint8)
                self._read_into(tensor, offset, sample)
                digest.update(raw_bytes(sample))
        return digest.hexdigest()

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors of equal shape hold the same bytes."""
        pairs = zip(self.pieces(first), self.pieces(second), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    def _read_rows(self, tensor: StoredTensor, start: int, out: npt.NDArray[Any]) -> None:
        """Rows from `start` on. CheckpointError where a value is NaN or infinite."""
        self._read_into(tensor, start * out[0].nbytes, out)
        if not all_finite(out, tensor.dtype):
            raise CheckpointError(
                f"{tensor.file}: '{tensor.name}' holds NaN or infinity in rows {start} to {start + len(out) - 1}; "
                "the source is damaged: download it again"
            )

    def _read_into(self, tensor: StoredTensor, offset: int, out: npt.NDArray[Any]) -> None:
        view = raw_bytes(out)
        descriptor = self._descriptor(tensor.file)
        position = tensor.offset + offset
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: can't be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{tensor.file}: became shorter while it was read; is it being written?")
            done += count
        if len(view) >= 1 << 20 and hasattr(os, "posix_fadvise"):  # else 15 GB of source push everything else out
            os.posix_fadvise(descriptor, position, len(view), os.POSIX_FADV_DONTNEED)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: can't be opened: {error.strerror}") from error
        return self._open[path]


def _rows_at_a_time(tensor: StoredTensor) -> int:
    return max(1, _PIECE // max(1, math.prod(tensor.shape[1:]) * _ITEM[tensor.dtype]))


def transpose_into(values: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """out[:] = values.T in blocks, which stay in the cache.

    A block is first laid out by itself: rows of a matrix of width 3584 are 7 kB apart, so that their columns would
    fall into four of the first-level cache's sets and push each other out. That halves the time.
    """
    high, wide, spare = 256, 128, 32  # spare values, so that the block's own rows are no power of two apart
    block = np.empty((high, wide + spare), dtype=values.dtype)
    for row in range(0, values.shape[0], high):
        for column in range(0, values.shape[1], wide):
            piece = values[row : row + high, column : column + wide]
            part = block[: piece.shape[0], : piece.shape[1]]
            part[:] = piece
            out[column : column + wide, row : row + high] = part.T


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError naming the file otherwise."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder needs it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return found


def _find(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; source=DIR names a folder with config.json and *.safetensors")
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
        missing = [name for name, file in weight_map.items() if name not in headers[file]]
        if missing:
            raise CheckpointError(
                f"{folder / INDEX}: says that '{missing[0]}' is in {weight_map[missing[0]]}, but it is not"
                f" ({len(missing)} such); download the checkpoint again"
            )
        return {name: headers[file][name] for name, file in weight_map.items()}
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    hint = "it has only pickled weights, which are never read: convert them" if list(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder}: neither {INDEX} nor {SINGLE} in it; {hint or 'is this the checkpoint folder?'}")
