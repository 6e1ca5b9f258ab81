"""The dense FFN in G shards that experts hold in turn, all copies of a shard alike: what several initialisers build on.

F need not be a multiple of the expert width: the last shard is filled with neurons whose down is zero, which leaves the
function exact.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import ConfigError
from moelab.initialisers import NO_SOURCE, DenseMatrix, NeuronPlan, UpcycleContext
from moelab_upcycling.dense import statistics
from moelab_upcycling.neurons import (
    Streams,
    choose_redrawn,
    drawn_rows,
    planned_rows,
    redraw_moments,
)
from moelab_upcycling.streams import permutation


def group_size(context: UpcycleContext) -> int:
    """G, the number of experts that make up one dense FFN. ConfigError where they don't fit the expert count."""
    group = -(-context.intermediate_size // context.layout.moe_intermediate_size)
    if context.layout.num_experts % group:
        raise ConfigError(
            f"a dense FFN of {context.intermediate_size} takes {group} experts of "
            f"{context.layout.moe_intermediate_size}, which does not divide num_experts {context.layout.num_experts}"
        )
    return group


class Shards:
    """Expert e holds shard e mod G of one fixed shuffle of the dense neurons."""

    def __init__(self, context: UpcycleContext, reinit_fraction: float = 0.0) -> None:
        self.reinit_fraction, self.dense_width = reinit_fraction, context.intermediate_size
        self.group, self.width = group_size(context), context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/virtual_group/1", context.layer_id)
        exact = context.norm_topk_prob and reinit_fraction == 0
        exact = exact and context.layout.num_experts_per_tok % self.group == 0
        parts = {"shared": ("copy", "dup"), "router": ("tied_groups",), "scaling": ("virtual_group",)}
        self.keeps_with = parts if exact else None
        self.warnings = []
        if context.layout.num_experts_per_tok % self.group:
            self.warnings.append(
                f"num_experts_per_tok {context.layout.num_experts_per_tok} is no multiple of the group of "
                f"{self.group}: a token does not get whole copies of the dense FFN"
            )

    @cached_property
    def _shards(self) -> npt.NDArray[np.int32]:
        order = permutation(self.streams("shuffle"), self.group * self.width)
        return np.where(order < self.dense_width, order, NO_SOURCE).astype(np.int32).reshape(self.group, self.width)

    def plan(self, expert: int) -> NeuronPlan:
        source = self._shards[expert % self.group]
        filler = source == NO_SOURCE
        redrawn = choose_redrawn(self.streams, expert, self.width, self.reinit_fraction)
        return NeuronPlan(source, {matrix: mask & ~filler for matrix, mask in redrawn.items()})

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        filler, redrawn = plan.source == NO_SOURCE, plan.redrawn[matrix]
        rows = np.flatnonzero(redrawn)
        moments = redraw_moments(plan, rows, dense, "dropped", 0)
        changed = plan.changed(matrix)
        new = np.zeros((int(changed.sum()), dense.values.shape[1]), dense.values.dtype)
        new[redrawn[changed]] = drawn_rows(len(rows), dense, self.streams("redraw", expert, matrix), moments)
        if matrix != "down" and filler.any():  # keyed by shard: the copies are alike in these too
            stream = self.streams("filler", expert % self.group, matrix)
            new[filler[changed]] = drawn_rows(int(filler.sum()), dense, stream, statistics(dense))
        return planned_rows(plan, matrix, dense.values, new)
