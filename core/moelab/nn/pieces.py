"""Tensors of which each process holds a piece (DTensor): made whole, and filled from whole ones.

A plain tensor is its own whole, so what stores and restores a model need not know whether it is spread.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def is_piece(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process. All of them ask, for the same tensors in the same order."""
    spread: Any = tensor
    full: Tensor = spread.full_tensor() if is_piece(tensor) else tensor
    return full


def _place() -> Callable[..., tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape and offset of this process's piece); imported where tensors lie in pieces, since that takes a second."""
    found: Any = import_module("torch.distributed.tensor._utils")
    return found.compute_local_shape_and_global_offset


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `full` where it lies as `like` does, on its device."""
    if not is_piece(like):
        return full.to(like.device)
    spread: Any = like
    shape, offset = _place()(full.shape, spread.device_mesh, spread.placements)
    for axis, (size, begin) in enumerate(zip(shape, offset, strict=True)):
        full = full.narrow(axis, min(begin, full.shape[axis]), size)
    return full.to(like.device)


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Set `tensor` to the values of `full`, each process its own piece."""
    spread: Any = tensor
    held: Tensor = spread.to_local() if is_piece(tensor) else tensor
    held.copy_(own_part(full, tensor))


def spread_as(full: Tensor, like: Tensor) -> Tensor:
    """`full` as it lies where `like` does: a new tensor, of which this process holds its piece."""
    part = own_part(full, like).clone()
    if not is_piece(like):
        return part
    spread: Any = like
    made: Tensor = type(spread).from_local(
        part, spread.device_mesh, spread.placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    return made
