"""A process among others: sums by all-reduce, and norms of gradients that lie in pieces on several meshes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelab.parallel.ranks import PartT, Ranks


class Group(Ranks):
    """All ranks of the default process group, which must be there."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), torch.device(device)

    def sum(self, value: Tensor) -> Tensor:
        """By one all-reduce, of a copy."""
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return summed

    def any(self, flag: bool) -> bool:
        """By one all-reduce of a number."""
        return bool(self.sum(torch.tensor(float(flag), device=self._device)) > 0)

    def gather(self, value: PartT) -> list[PartT]:
        """Between our own processes, so what is exchanged is nobody else's."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, found: str | None) -> str | None:
        """By `gather`."""
        told = enumerate(self.gather(found))
        return next((f"{text} (rank {rank})" for rank, text in told if text is not None), None)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Each element once: a piece that several ranks hold alike counts for one of them.

        `clip_grad_norm_` refuses gradients of two meshes, and `is_shard()` is false for the strided shards of
        experts under FSDP; so each rank adds the squares of what it holds, divided by how many hold the same.
        """
        total = None
        for parameter in parameters:
            if parameter.grad is None:
                continue
            local, copies = _local(parameter.grad, self.size)
            squares = local.detach().double().square().sum() / copies
            total = squares if total is None else total + squares
        assert total is not None, "no parameter has a gradient"
        return self.sum(total).sqrt().float()

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
        """In place, piece by piece; as torch's: by most / (norm + 1e-6), never up."""
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad, self.size)[0].mul_(factor)


def _local(gradient: Tensor, world: int) -> tuple[Tensor, int]:
    """(what this rank holds of it, on how many ranks the same lies)."""
    if not isinstance(gradient, DTensor):
        return gradient, world
    mesh, copies = gradient.device_mesh, world // gradient.device_mesh.size()
    for axis, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            copies *= mesh.size(axis)
    return gradient.to_local(), copies
