"""The values of one tensor, out of a file of tensors and into memory that stands already; `tensor_file` wrote them.

Read, not mapped: pages of a mapped file count as the process's own until they are given back, so that a model that is
filled from a mapping takes its weights twice.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from moelab.safe_files import Reading
from moelab.tensor_file import DTYPES

_PIECE = 4 << 20  # numbers converted at a time


@torch.no_grad()
def read_values(path: Path, offset: int, dtype: str, into: Tensor, reading: Reading) -> None:
    """Set `into` to the numbers that lie at `offset`, of the type that safetensors calls `dtype`, converted as needed.

    `into` may be of any type, strides and device. Raises what `reading` does where the file can't be read or is short.
    """
    if dtype not in DTYPES:
        reading.refuse(path, f"holds {dtype[:20]!r}, a type that moelab does not read")
    stored = DTYPES[dtype]
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            if not into.is_contiguous():
                whole = torch.empty(into.shape, dtype=stored)
                _fill(file.fileno(), whole)
                into.copy_(whole)
                return
            flat = into.view(-1)
            if flat.dtype == stored and flat.device.type == "cpu":
                _fill(file.fileno(), flat)
                return
            buffer = torch.empty(min(_PIECE, flat.numel()), dtype=stored)
            for piece in flat.split(_PIECE):
                part = buffer[: piece.numel()]
                _fill(file.fileno(), part)
                piece.copy_(part)
    except OSError as error:
        reading.refuse(path, f"can't be read: {error.strerror or error}", error)


def _fill(descriptor: int, tensor: Tensor) -> None:
    """All bytes of a contiguous tensor of the CPU, from where the file stands. Raises OSError where it ends before."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    left = memoryview(raw.numpy())  # type: ignore[arg-type]
    while left:
        count = os.readv(descriptor, [left])
        if not count:
            raise OSError(f"it ends {len(left)} bytes before its tensors do")
        left = left[count:]
    if sys.byteorder == "big":
        raw.copy_(raw.reshape(-1, tensor.element_size()).flip(1).reshape(-1))
