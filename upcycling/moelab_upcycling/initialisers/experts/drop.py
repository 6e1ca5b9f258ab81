"""Drop-Upcycling (Nakamura et al., ICLR 2025, 2502.19261): each expert its own permutation, a part of it redrawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.neurons import (
    INDEX_SETS,
    Streams,
    check_choice,
    check_fraction,
    check_width,
    choose_redrawn,
    drawn_rows,
    planned_rows,
    redraw_moments,
)
from moelab_upcycling.streams import permutation


@dataclass
class DropOptions:
    reinit_fraction: float = 0.5  # r of the paper
    index_sets: str = "shared"  # the paper's; its published code draws `independent` sets for gate, up and down

    def __post_init__(self) -> None:
        check_fraction("reinit_fraction", self.reinit_fraction)
        check_choice("index_sets", self.index_sets, INDEX_SETS)


class DropExperts:
    """Dense-width experts (or a random part of the FFN each); redrawn like the dropped values of each matrix."""

    def __init__(self, options: DropOptions, context: UpcycleContext) -> None:
        self.options, self.dense_width = options, context.intermediate_size
        self.width = context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/drop/1", context.layer_id)
        check_width(self.width, self.dense_width, "use narrower experts, or qwen2 with allow_twins=true")

    def plan(self, expert: int) -> NeuronPlan:
        source = permutation(self.streams("shuffle", expert), self.dense_width)[: self.width]
        independent = self.options.index_sets == "independent"
        fraction = self.options.reinit_fraction
        return NeuronPlan(source, choose_redrawn(self.streams, expert, self.width, fraction, independent=independent))

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """The rows that the plan marks [k, D]; the others are copies."""
        rows = np.flatnonzero(plan.redrawn[matrix])
        moments = redraw_moments(plan, rows, dense, "dropped", 0)
        return drawn_rows(len(rows), dense, self.streams("redraw", expert, matrix), moments)

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, expert, matrix, dense))


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("drop", DropOptions, DropExperts)]
