"""Whether two checkpoints' experts stand in the same order, and if not, in which: told from a few rows of each.

An order of experts changes no function, so two trainings from unlike starts may have each other's experts under other
numbers; then a merge of equal numbers merges unlike experts. Only whole experts are looked at: a model whose neurons
stand in another order within its experts is like no other in these rows, and that is told too.

E experts, D hidden size, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.tensor_parts import Stored, read_block

ROWS = 8  # of each expert's first matrix that are compared
CLEAR = 0.1  # by which the mean cosine of another order must be larger
ALIKE = 0.5  # mean cosine below which experts have little in common


@dataclass(frozen=True)
class Order:
    """Of one layer's experts beside those of the leading checkpoint."""

    experts: tuple[int, ...]  # [E]: which expert is like the leading one's 0, 1, ...
    as_they_are: float  # mean cosine of experts of the same number
    so: float  # and in this order

    @property
    def differs(self) -> bool:
        return self.so > self.as_they_are + CLEAR


def order_of(leading: Stored, other: Stored) -> Order:
    """gate_up [E, M F, D] of both."""
    ours, theirs = (_rows(stored) for stored in (leading, other))
    alike = ours @ theirs.T  # [E, E]
    taken = _pairs(alike)
    count = len(alike)
    return Order(
        tuple(taken), float(alike.diagonal().mean()), float(alike[torch.arange(count), torch.tensor(taken)].mean())
    )


def _rows(stored: Stored) -> Tensor:
    """[E, R D] fp32, each of length 1."""
    experts, rows, columns = stored.shape
    found = torch.empty(experts, min(rows, ROWS), columns)
    for expert in range(experts):
        read_block(stored, (expert, 0, 0), found[expert : expert + 1])
    return torch.nn.functional.normalize(found.flatten(1), dim=1)


def _pairs(alike: Tensor) -> list[int]:
    """Each of ours with one of theirs, the likest pair first. [E, E] -> [E]."""
    left = alike.clone()
    taken = [0] * len(alike)
    for _ in range(len(alike)):
        ours, theirs = divmod(int(left.argmax()), len(alike))
        taken[ours] = theirs
        left[ours], left[:, theirs] = -2.0, -2.0
    return taken
