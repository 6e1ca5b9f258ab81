"""Weights in eight bits with a scale for each block: `weight` F8_E4M3 beside `weight_scale_inv`, DeepSeek-V3's.

After DeepSeek-V3's README_WEIGHTS.md: a block of `weight_block_size` numbers times its entry of weight_scale_inv is
the weight; blocks at the edges are cut short. Free of torch until a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelab.errors import CheckpointError
from moelab.hf.files import StoredTensor

STORED = "F8_E4M3"  # as safetensors spells it
SUFFIX = "_scale_inv"
LARGEST = 1 << 16  # edge of a block
Block = tuple[int, int]


def block_of(said: Any) -> Block | None:
    """(rows, columns) of a block, where config.json's quantization_config says just this; None for all else."""
    if not isinstance(said, dict) or said.get("quant_method") != "fp8" or said.get("fmt", "e4m3") != "e4m3":
        return None
    size = said.get("weight_block_size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(one) is int and 1 <= one <= LARGEST for one in size)
    ):
        return None
    return size[0], size[1]


def with_scales(tensors: Mapping[str, StoredTensor], block: Block) -> dict[str, StoredTensor]:
    """Each eight-bit tensor with its scales, which are no tensors of their own any more.

    Raises CheckpointError for one without scales, or with scales of another number of blocks.
    """
    found = dict(tensors)
    for name, stored in tensors.items():
        if stored.dtype != STORED:
            continue
        scales = found.pop(f"{name}{SUFFIX}", None)
        wanted = tuple(-(-size // edge) for size, edge in zip(stored.shape, block, strict=False))
        if len(stored.shape) != 2 or scales is None or scales.shape != wanted:
            has = "there is none" if scales is None else f"it has shape {list(scales.shape)}"
            raise CheckpointError(
                f"{stored.path}: {name}: is {STORED} of shape {list(stored.shape)}, so it needs {name}{SUFFIX} of "
                f"shape {list(wanted)}, and {has}; download the checkpoint again"
            )
        found[name] = replace(stored, dtype="F32", scales=scales, block=block)
    return found
