"""Where the blocks of MegaBlocks' block-sparse matrices lie, in int32: plain torch, on any device.

stk's own indices are int16, and since triton 3.2 products of those overflow beyond 256 block columns (stk pull
request 17); with int32 indices the kernels are right as they are. P padded rows, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of a block; MegaBlocks knows no other


@dataclass(frozen=True)
class Bins:
    """Rows of each expert, and the same rounded up to whole blocks. Ends, not starts: inclusive sums."""

    rows: Tensor  # [E] int32
    padded_rows: Tensor  # [E] int32


@dataclass(frozen=True)
class Topology:
    """A block-diagonal matrix [P, E * width] in stk's terms: block compressed rows, and their transpose."""

    shape: tuple[int, int]
    row: Tensor  # [B] int32, block row of each of the B blocks
    column: Tensor  # [B] int32
    starts: Tensor  # [P / 128 + 1] int32, first block of each block row
    row_transposed: Tensor  # [B] int32: block row, going down the columns
    starts_transposed: Tensor  # [E * width / 128 + 1] int32
    block_transposed: Tensor  # [B] int32: which block, going down the columns


def bins(counts: Tensor) -> Bins:
    """counts [E] int64."""
    padded = (counts + BLOCK - 1).div(BLOCK, rounding_mode="floor") * BLOCK
    return Bins(counts.cumsum(0, dtype=torch.int32), padded.cumsum(0, dtype=torch.int32))


def topology(padded_rows: Tensor, rows: int, width: int) -> Topology:
    """Expert e's padded rows meet the columns e * width .. (e + 1) * width. No host synchronisation, no sort.

    padded_rows [E] int32 as in `Bins`, rows = P, width a multiple of 128.
    """
    device, experts = padded_rows.device, padded_rows.numel()
    block_rows, across = rows // BLOCK, width // BLOCK
    ends = padded_rows.div(BLOCK, rounding_mode="floor")  # [E] in block rows
    heights = torch.diff(ends, prepend=ends.new_zeros(1))
    block_row = torch.arange(block_rows, device=device, dtype=torch.int32)
    expert = torch.searchsorted(ends, block_row, right=True)  # [block_rows] int64
    column = (expert * across).unsqueeze(1) + torch.arange(across, device=device)  # [block_rows, across]

    # One expert's blocks are contiguous in both orders: number i of them stands at (i mod height) down the columns.
    of_block = expert.repeat_interleave(across, output_size=block_rows * across)
    first, height = (ends - heights)[of_block], heights[of_block]
    inside = torch.arange(block_rows * across, device=device, dtype=torch.int32) - first * across
    row_transposed = first + inside.remainder(height)
    block_transposed = row_transposed * across + inside.div(height, rounding_mode="floor")
    per_column = heights.repeat_interleave(across, output_size=experts * across)
    return Topology(
        shape=(rows, experts * width),
        row=block_row.repeat_interleave(across, output_size=block_rows * across),
        column=column.flatten().int(),
        starts=torch.arange(0, block_rows * across + 1, across, device=device, dtype=torch.int32),
        row_transposed=row_transposed.int(),
        starts_transposed=torch.cat([per_column.new_zeros(1), per_column.cumsum(0)]).int(),
        block_transposed=block_transposed.int(),
    )
