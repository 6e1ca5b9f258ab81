"""Tensors that lie in files in parts, and any block of one, read straight into memory: no file is mapped.

A part is a stored tensor and the place of ours that it holds: rows of it, in a checkpoint of several processes; one
expert's matrix, transposed, in a Hugging Face folder. A process that holds a block of a tensor reads the bytes of that
block, at most a piece of them beside it. Never unpickles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moelab.errors import CheckpointError
from moelab.tensor_file import DTYPES

Shape = tuple[int, ...]
_PIECE = 16 << 20  # bytes read beside what they are for, where they must be turned or converted


@dataclass(frozen=True)
class Part:
    """A tensor in a safetensors file, and where its values lie in ours."""

    path: Path
    name: str  # in the file
    offset: int  # bytes before it in the file
    dtype: str  # as safetensors spells it
    shape: Shape  # as it is stored
    index: tuple[int | slice, ...] = ()  # of ours; () is all of it
    transposed: bool = False  # its two last axes
    turn: int | None = None  # of two that lie in turns along its last axis: which one
    decoded: Callable[[], Tensor] | None = None  # all of it, where the bytes in the file are not the values (GGUF)

    def block(self, whole: Shape) -> list[tuple[int, int]]:
        """[(first, end)] on each axis of ours, which has the shape `whole`."""
        found = []
        for axis, size in enumerate(whole):
            at = self.index[axis] if axis < len(self.index) else slice(None)
            first, end, _ = at.indices(size) if isinstance(at, slice) else (at, at + 1, 1)
            found.append((first, end))
        return found


@dataclass(frozen=True)
class Stored:
    """One of our tensors on disk; the parts cover it once."""

    shape: Shape
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its first part."""
        return _dtype(self.parts[0])

    def read(self) -> Tensor:
        """All of it, as it is stored, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        read_block(self, (0,) * len(self.shape), out)
        return out


@torch.no_grad()
def read_block(stored: Stored, first: Sequence[int], out: Tensor) -> None:
    """Fill `out`, in its own type and on its device, with the block of `stored` that begins at `first`.

    Raises CheckpointError naming the file for one that can't be read or is cut short.
    """
    for part in stored.parts:
        place = part.block(stored.shape)
        ours = [
            (max(begin, low), min(begin + size, high))
            for begin, size, (low, high) in zip(first, out.shape, place, strict=True)
        ]
        if any(low >= high for low, high in ours):
            continue
        into = out
        taken: list[tuple[int, int]] = []
        for axis in reversed(range(out.dim())):
            (low, high), (origin, _) = ours[axis], place[axis]
            if axis < len(part.index) and isinstance(part.index[axis], int):
                into = into.select(axis, low - first[axis])
            else:
                into = into.narrow(axis, low - first[axis], high - low)
                taken.insert(0, (low - origin, high - origin))
        if part.transposed:
            into, taken[-2:] = into.mT, [taken[-1], taken[-2]]
        _read(part, taken, into)


def _read(part: Part, taken: Sequence[tuple[int, int]], into: Tensor) -> None:
    """taken: [(first, end)] on each axis of the stored tensor; `into` has that shape."""
    if part.decoded is not None:
        values = _own(part.decoded(), part)
        for axis, (low, high) in enumerate(taken):
            values = values.narrow(axis, low, high - low)
        into.copy_(values)
        return
    dtype = _dtype(part)
    row = dtype.itemsize
    for size in part.shape[1:]:
        row *= size
    first, end = taken[0] if taken else (0, 1)
    narrow = any(span != (0, size) for span, size in zip(taken[1:], part.shape[1:], strict=True))
    try:
        descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not narrow and into.dtype == dtype and into.is_contiguous() and into.device.type == "cpu":
                _fill(descriptor, part, part.offset + first * row, into)
                return
            for begin, count in _runs(first, end, max(1, _PIECE // max(row, 1))):
                rows = torch.empty((count, *part.shape[1:]) if taken else (), dtype=dtype)
                _fill(descriptor, part, part.offset + begin * row, rows)
                rows = _own(rows, part)
                for axis, (low, high) in enumerate(taken[1:], start=1):
                    rows = rows.narrow(axis, low, high - low)
                (into.narrow(0, begin - first, count) if taken else into).copy_(rows)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{part.path}: {part.name}: can't be read: {error.strerror}") from error


def _own(values: Tensor, part: Part) -> Tensor:
    return values if part.turn is None else values[..., part.turn :: 2]


def _dtype(part: Part) -> torch.dtype:
    if part.dtype not in DTYPES:
        raise CheckpointError(f"{part.path}: {part.name}: is stored as {part.dtype}, which moelab does not read")
    return DTYPES[part.dtype]


def _runs(first: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """(begin, count) of runs of at most `most`."""
    for begin in range(first, end, most):
        yield begin, min(most, end - begin)


def _fill(descriptor: int, part: Part, offset: int, out: Tensor) -> None:
    """All bytes of `out`, contiguous on the CPU, from the file."""
    flat = out.detach().reshape(-1).view(torch.uint8)
    data = memoryview(flat.numpy())  # type: ignore[arg-type]
    while data:
        count = os.preadv(descriptor, [data[: 1 << 30]], offset)
        if not count:
            raise CheckpointError(f"{part.path}: {part.name}: is cut short; use an earlier checkpoint, or restore it")
        data, offset = data[count:], offset + count
    if sys.byteorder == "big":
        flat.copy_(flat.view(-1, out.element_size()).flip(1).reshape(-1))
