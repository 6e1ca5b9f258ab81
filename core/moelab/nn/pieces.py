"""Tensors of which each process holds a piece (DTensor): where it lies, and how it is filled.

A plain tensor is its own whole, so what stores and restores a model need not know whether it is spread.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moelab.tensor_parts import Stored, read_block


def is_piece(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "full_tensor")


def is_writer(piece: Tensor, turn: int) -> bool:
    """Whether this process writes what it holds of it: of those that hold the same, each in its turn."""
    spread: Any = piece
    mesh = spread.device_mesh
    alike = [axis for axis, placement in enumerate(spread.placements) if placement.is_replicate()]
    return all(mesh.get_local_rank(axis) == turn % mesh.size(axis) for axis in alike)


def _place() -> Callable[..., tuple[tuple[int, ...], tuple[int, ...]]]:
    """(shape and offset of this process's piece); imported where tensors lie in pieces, since that takes a second."""
    found: Any = import_module("torch.distributed.tensor._utils")
    return found.compute_local_shape_and_global_offset


def held(tensor: Tensor) -> Tensor:
    """What this process holds of it: its own memory."""
    spread: Any = tensor
    local: Tensor = spread.to_local() if is_piece(tensor) else tensor
    return local


def first_of(tensor: Tensor) -> tuple[int, ...]:
    """Where in the whole the first element lies that this process holds."""
    if not is_piece(tensor):
        return (0,) * tensor.dim()
    spread: Any = tensor
    _, offset = _place()(spread.shape, spread.device_mesh, spread.placements)
    return tuple(min(begin, size) for begin, size in zip(offset, tensor.shape, strict=True))


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `full` where it lies as `like` does, on its device."""
    if is_piece(like):
        for axis, (size, begin) in enumerate(zip(held(like).shape, first_of(like), strict=True)):
            full = full.narrow(axis, begin, size)
    return full.to(like.device)


def let_go(model: nn.Module) -> None:
    """Cut again what a forward pass left whole for a backward one that does not come; of a model in pieces (FSDP2).

    Until then `parameters()` gives what was gathered, whose gradients stay None, and not what the optimizer has.
    """
    for module in model.modules():
        cut = getattr(type(module), "reshard", None)  # FSDP2's, which is a unit's own and not that of its parts
        if cut is not None:
            cut(module)


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Set `tensor` to the values of `full`, each process its own piece."""
    held(tensor).copy_(own_part(full, tensor))


@torch.no_grad()
def fill_from(tensor: Tensor, stored: Stored) -> None:
    """Set `tensor` to what is stored, each process its own piece, of which alone it reads the bytes."""
    read_block(stored, first_of(tensor), held(tensor))


def read_as(stored: Stored, like: Tensor) -> Tensor:
    """What is stored, as it lies where `like` does and in its own type: a new tensor."""
    part = torch.empty(held(like).shape, dtype=stored.dtype, device=like.device)
    read_block(stored, first_of(like), part)
    return _spread(part, like)


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which each process has a `part`, laid as `like`. All of them call it."""
    spread: Any = _spread(part, like)
    whole: Tensor = spread.full_tensor() if is_piece(like) else part
    return whole


def _spread(part: Tensor, like: Tensor) -> Tensor:
    if not is_piece(like):
        return part
    spread: Any = like
    made: Tensor = type(spread).from_local(
        part, spread.device_mesh, spread.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made
