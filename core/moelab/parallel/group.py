"""A process among others: sums by all-reduce, and norms of gradients that lie in pieces on several meshes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moelab.errors import RunFailure, UserError
from moelab.parallel.ranks import Lost, Ranks
from moelab.parallel.roll import Roll


class Group(Ranks):
    """All ranks of the default process group, which must be there."""

    def __init__(self, device: torch.device | str = "cpu", roll: Roll | None = None) -> None:
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), torch.device(device)
        self._roll = roll
        self._left = False

    def sum(self, value: Tensor) -> Tensor:
        """By one all-reduce, of a copy."""
        summed = value.detach().clone()
        dist.all_reduce(summed)
        return summed

    def any(self, flag: bool) -> bool:
        """By one all-reduce of a number."""
        return bool(self.sum(torch.tensor(float(flag), device=self._device)) > 0)

    def first(self, found: str | None) -> str | None:
        """Between our own processes, so what is exchanged is nobody else's."""
        all_found: list[str | None] = [None] * self.size
        dist.all_gather_object(all_found, found)
        return next((f"{text} (rank {rank})" for rank, text in enumerate(all_found) if text is not None), None)

    def lost(self) -> Lost:
        """As the roll says."""
        self._left = True  # its own end is another's
        return super().lost() if self._roll is None else self._roll.lost()

    def leave(self, error: BaseException) -> None:
        """Its first error counts."""
        if self._roll is not None and not self._left:
            self._left = True
            words = str(error) if isinstance(error, UserError | RunFailure) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the store may be gone, and this error is the one to be heard
                self._roll.leave(words, mistake=isinstance(error, UserError))

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
