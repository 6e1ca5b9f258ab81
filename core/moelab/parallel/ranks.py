"""What a step must know of the other processes: their sums, and which micro-batches are its own.

Every process (rank) reads other sequences of one global batch, whatever axes of the mesh it lies on, so whatever is
summed over micro-batches is then summed over all ranks. `Ranks` itself is the single process, which sums nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from moelab.moe.balance import router_gradient_norms

PartT = TypeVar("PartT")


@dataclass(frozen=True)
class Lost:
    """Why a collective failed: which process ended, with its own words where it left some."""

    text: str
    left_to_main: bool  # whether the main process tells it: it is not the one that ended
    mistake: bool = False  # the user's


class Ranks:
    """One process alone."""

    rank = 0
    size = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank. All ranks call it, in the same order."""
        return value

    def own(self, parts: Sequence[PartT]) -> list[tuple[int, PartT]]:
        """This rank's micro-batches with their places in the global batch, which key their noise: a run of them."""
        each, rest = divmod(len(parts), self.size)
        assert rest == 0, f"{len(parts)} micro-batches don't divide among {self.size} processes"
        first = self.rank * each
        return list(enumerate(parts))[first : first + each]

    def any(self, flag: bool) -> bool:
        """Whether it holds on a rank; on every rank the same."""
        return flag

    def gather(self, value: PartT) -> list[PartT]:
        """What each rank gives, on every rank; small plain values."""
        return [value]

    def first(self, found: str | None) -> str | None:
        """What the first rank that found something found, on every rank."""
        return found

    def lost(self) -> Lost:
        """After a collective that failed: whose end that was. Waits a few seconds, and for no other rank."""
        return Lost("another process ended, or did not come in time", left_to_main=True)

    def leave(self, error: BaseException) -> None:
        """This rank ends with an error of its own, which the main one is to tell."""

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """L2 norm of the whole gradient, a scalar, the same on every rank."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(gradient.dtype == torch.bfloat16 for gradient in gradients):  # whose norms would be rounded to it
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            return torch.linalg.vector_norm(torch.stack(norms))
        return torch.nn.utils.get_total_norm(gradients)

    def begin(self, model: nn.Module) -> None:
        """Before a step asks for parameters: those of a model in pieces are pieces, whatever ran before."""

    def accumulate(self, model: nn.Module, *, last: bool) -> None:
        """Before each micro-batch: the next backward pass is, or isn't, the one behind which gradients are summed."""

    def router_norms(
        self, terms: Mapping[str, Tensor], routers: Sequence[Sequence[nn.Parameter]], model: nn.Module
    ) -> dict[str, Tensor]:
        """{term: norms [len(routers)]}: how much of each router's gradient comes from each term of the loss.

        terms: {name: weighted scalar} of the batch's first micro-batch, on the rank that has it; of another one on the
        others, where they count nothing. Before any backward pass of the step, and no gradient is left.
        """
        return router_gradient_norms(terms, routers)

    def clip(self, parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
        """Scale gradients whose `norm` is larger than `most` down to it; no pass over those that stay as they are."""
        if norm + 1e-6 > most:  # as torch's: by most / (norm + 1e-6), where that is below one
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)


ALONE = Ranks()
