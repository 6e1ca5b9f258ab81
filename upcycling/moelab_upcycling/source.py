"""A dense checkpoint read as bytes: moelab.hf says what is there, pread brings it, the page cache is left alone.

safetensors' own reader maps the file: on a cold 15 GB source its page faults cost five times the read itself.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.errors import CheckpointError
from moelab.hf.checkpoint_folder import open_folder
from moelab.hf.files import StoredTensor
from moelab.registry import Registry
from moelab_upcycling.dtypes import STORAGE, all_finite, raw_bytes

_ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PIECE = 8 << 20  # bytes read at a time
_FOLIO = 2 << 20  # as many bytes as Linux keeps together in its page cache, at most


class DenseSource:
    """All tensors of a checkpoint folder, sharded or not. Picklable before the first read; close() after the last."""

    def __init__(self, folder: Path, registry: Registry | None = None) -> None:
        """Raises CheckpointError for whatever `open_folder` refuses; `registry` as there."""
        self.folder = folder
        self.opened = open_folder(folder, registry)
        self.stored = self.opened.stored
        self.tensors = self.stored.tensors
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
            self._read_rows(tensor, int(row), out[place : place + 1])
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

    def _read_rows(self, tensor: StoredTensor, start: int, out: npt.NDArray[Any]) -> None:
        """Rows from `start` on. CheckpointError where a value is NaN or infinite."""
        if tensor.is_plain:
            self._read_into(tensor, start * out[0].nbytes, out)
        else:
            self._decode_rows(tensor, start, out)
        if not all_finite(out, tensor.dtype):
            raise CheckpointError(
                f"{tensor.path}: '{tensor.name}' holds NaN or infinity in rows {start} to {start + len(out) - 1}; "
                "the source is damaged: download it again"
            )

    def _decode_rows(self, tensor: StoredTensor, start: int, out: npt.NDArray[Any]) -> None:
        """Of a GGUF file; rows that are rotated come in whole heads."""
        whole = tensor.shape[0] // tensor.paired_heads if tensor.paired_heads else 1
        first, last = start // whole * whole, -(-(start + len(out)) // whole) * whole
        size = tensor.nbytes // tensor.shape[0]
        raw = np.empty((last - first, size), dtype=np.uint8)
        self._read_into(tensor, first * size, raw)
        heads = (last - first) // whole if tensor.paired_heads else 0
        out[...] = tensor.decoded(raw, heads).reshape(last - first, -1)[start - first : start - first + len(out)]

    def _read_into(self, tensor: StoredTensor, offset: int, out: npt.NDArray[Any]) -> None:
        view = raw_bytes(out)
        descriptor = self._descriptor(tensor.path)
        position = tensor.offset + offset
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{tensor.path}: can't be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{tensor.path}: became shorter while it was read; is it being written?")
            done += count
        if len(view) >= 1 << 20 and hasattr(os, "posix_fadvise"):  # else 15 GB of source push everything else out
            # Of pages that hang together and are named in part none goes, and those left here and there make the next
            # read of this file three times as dear: so from where the ones begin that the piece before ended in.
            begin = position // _FOLIO * _FOLIO
            os.posix_fadvise(descriptor, begin, position + len(view) - begin, os.POSIX_FADV_DONTNEED)

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
