"""Experts that a checkpoint holds in MXFP4, read as the bfloat16 numbers that they stand for.

A block of 32 numbers along what a matrix reads: 4 bits each, two a byte, the first in the lower half, and one exponent,
so that each is v 2^(e - 127), v one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats 1.0,
E2M1 with E8M0; not opened). As transformers 5.23, integrations/mxfp4.py: convert_moe_packed_tensors, whose tensors
`*_blocks` [E, rows, columns / 32, 16] and `*_scales` [E, rows, columns / 32] become [E, columns, rows].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moelab.errors import CheckpointError
from moelab.hf.files import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

MXFP4, STORED = "MXFP4", "U8"
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK, BYTES = 32, 16
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], 1)  # [256, 2]: of each byte, the lower half first


def joined(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Each pair of blocks and scales as the one tensor that it stands for; the others as they are.

    Raises CheckpointError for a pair that does not fit, or is none.
    """
    found = dict(tensors)
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        whole = name.removesuffix(BLOCKS)
        scales = tensors.get(whole + SCALES)
        if scales is None or whole in tensors:
            what = f"without {whole + SCALES}" if scales is None else f"beside {whole}"
            raise CheckpointError(f"{blocks.path}: {name}: stands there {what}; download the checkpoint again")
        if (
            len(blocks.shape) != 4
            or blocks.shape[3] != BYTES
            or blocks.shape[:3] != scales.shape
            or (blocks.dtype, scales.dtype) != (STORED, STORED)
        ):
            raise CheckpointError(
                f"{blocks.path}: {name}: {blocks.dtype} {list(blocks.shape)} with scales {scales.dtype} "
                f"{list(scales.shape)} is no MXFP4: bytes [experts, rows, blocks, {BYTES}], and one for each block"
            )
        experts, rows, count, _ = blocks.shape
        del found[name], found[whole + SCALES]
        shape = (experts, count * BLOCK, rows)
        found[whole] = replace(blocks, name=whole, shape=shape, dtype="BF16", encoding=MXFP4, scales=scales)
    return found


def read_expert(stored: StoredTensor, expert: int) -> Tensor:
    """One expert of a `joined` tensor: [1, columns, rows] bfloat16."""
    import torch  # noqa: PLC0415  (headers are read without it)

    assert stored.scales is not None
    _, columns, rows = stored.shape
    blocks = _bytes(stored, expert).reshape(rows, columns // BLOCK, BYTES)
    exponents = _bytes(stored.scales, expert).reshape(rows, -1, 1).astype(np.int32) - 127
    values = np.ldexp(_PAIRS[blocks].reshape(rows, columns // BLOCK, BLOCK), exponents)
    return torch.from_numpy(values.reshape(rows, columns)).to(torch.bfloat16).mT[None]


def _bytes(stored: StoredTensor, expert: int) -> np.ndarray:
    """Of one expert."""
    count = stored.nbytes // stored.shape[0]
    raw = np.empty(count, np.uint8)
    try:
        with open(stored.path, "rb") as file:
            file.seek(stored.offset + expert * count)
            found = file.readinto(raw.data)
    except OSError as error:
        raise CheckpointError(f"{stored.path}: {stored.name}: can't be read: {error.strerror}") from error
    if found != count:
        raise CheckpointError(f"{stored.path}: became shorter while it was read; is it being written?")
    return raw
