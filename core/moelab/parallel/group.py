"""A process among others: sums by all-reduce, and norms of gradients that lie in pieces on several meshes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moelab.config.run import ParallelConfig
from moelab.errors import RunFailure, UserError
from moelab.nn.pieces import let_go
from moelab.parallel.ranks import Lost, PartT, Ranks
from moelab.parallel.roll import Roll


class Group(Ranks):
    """All ranks of the default process group, which must be there."""

    def __init__(
        self, device: torch.device | str = "cpu", roll: Roll | None = None, *, config: ParallelConfig | None = None
    ) -> None:
        """`config`: how gradients add up and whether layers stay whole; None: the defaults."""
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), torch.device(device)
        self._roll = roll
        self._left = False
        config = config or ParallelConfig()
        self._in_pieces = config.accumulate == "pieces"
        self._keeps_layers = not config.reshard_after_forward

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

    def begin(self, model: nn.Module) -> None:
        """Lets go what an evaluation left gathered."""
        let_go(model)

    def accumulate(self, model: nn.Module, *, last: bool) -> None:
        """Sums over replicas wait for the last micro-batch in any case; those over shards if gradients are whole.

        Layers that stay whole between their passes stay so between micro-batches too: the memory is taken already.
        """
        assert isinstance(model, FSDPModule), "not laid over processes"
        model.set_requires_gradient_sync(last or self._in_pieces)
        model.set_requires_all_reduce(last)
        if self._keeps_layers:
            model.set_reshard_after_backward(last)

    def router_norms(
        self, terms: Mapping[str, Tensor], routers: Sequence[Sequence[nn.Parameter]], model: nn.Module
    ) -> dict[str, Tensor]:
        """By a whole backward pass for each term: to parameters in pieces `autograd.grad` finds no way.

        All terms take part in each, times zero but one, so that every layer's gradients are summed over the ranks.
        """
        norms = {}
        self.accumulate(model, last=True)
        for name in terms:
            chosen = {other: float(other == name and self.main) for other in terms}
            torch.stack([value * chosen[other] for other, value in terms.items()]).sum().backward(retain_graph=True)
            reached = [[p for p in router if p.grad is not None] for router in routers]
            nothing = torch.zeros((), device=self._device)
            norms[name] = torch.stack([self.gradient_norm(group) if group else nothing for group in reached])
            model.zero_grad(set_to_none=True)
        return norms

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
