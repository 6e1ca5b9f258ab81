"""Qwen2-57B-A14B's own initialiser (Qwen2 report 2.2.2): fine-grained experts from shuffled copies, half redrawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.assignment import cut_from_copies
from moelab_upcycling.neurons import (
    INDEX_SETS,
    STATISTICS,
    Streams,
    check_choice,
    check_fraction,
    check_width,
    choose_redrawn,
    drawn_rows,
    elementwise_redraw,
    nothing_redrawn,
    planned_rows,
    redraw_moments,
)


@dataclass
class Qwen2Options:
    reinit_fraction: float = 0.5  # of each expert's neurons (or elements) that are redrawn
    mode: str = "neuron"  # neuron: half of the neurons survive whole; element: none does. The report does not say
    index_sets: str = "shared"  # shared: gate, up and down redraw the same neurons; independent: each its own
    statistics: str = "dropped"  # redrawn like the dropped values, the whole `dense` matrix, or `config`'s std
    dedup: bool = True  # no neuron twice in an expert: such twins get equal gradients for ever
    allow_twins: bool = False  # let experts be wider than the dense FFN

    def __post_init__(self) -> None:
        check_fraction("reinit_fraction", self.reinit_fraction)
        check_choice("mode", self.mode, ("neuron", "element"))
        check_choice("index_sets", self.index_sets, INDEX_SETS)
        check_choice("statistics", self.statistics, STATISTICS)


class Qwen2Experts:
    """Copies of the FFN, each shuffled, laid end to end, cut into experts; then a part of each is redrawn."""

    def __init__(self, options: Qwen2Options, context: UpcycleContext) -> None:
        self.options, self.context = options, context
        self.streams = Streams(context.seed, "experts/qwen2/1", context.layer_id)
        width, dense, experts = (
            context.layout.moe_intermediate_size,
            context.intermediate_size,
            context.layout.num_experts,
        )
        if not options.allow_twins:
            check_width(width, dense, "use narrower experts or allow_twins=true")
        self.width = width
        self.warnings = []
        if experts * width < dense:
            self.warnings.append(f"{experts} experts of {width} hold {experts * width} of the {dense} dense neurons")

    @cached_property
    def _assignment(self) -> npt.NDArray[np.int32]:
        dense, layout = self.context.intermediate_size, self.context.layout
        dedup = self.options.dedup and self.width <= dense
        return cut_from_copies(self.streams, dense, layout.num_experts, self.width, dedup=dedup)

    def plan(self, expert: int) -> NeuronPlan:
        options = self.options
        if options.mode == "element":
            return NeuronPlan(self._assignment[expert], nothing_redrawn(self.width))
        independent = options.index_sets == "independent"
        redrawn = choose_redrawn(self.streams, expert, self.width, options.reinit_fraction, independent=independent)
        return NeuronPlan(self._assignment[expert], redrawn)

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any] | None:
        """The rows that the plan marks [k, D]; None where single elements are redrawn, in all of them."""
        if self.options.mode == "element":
            return None
        rows = np.flatnonzero(plan.redrawn[matrix])
        return drawn_rows(len(rows), dense, self.streams("redraw", expert, matrix), self._moments(plan, rows, dense))

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        new = self.redrawn(plan, expert, matrix, dense)
        if new is not None:
            return planned_rows(plan, matrix, dense.values, new)
        out = dense.values[plan.source]
        moments = None
        if self.options.statistics != "dropped":
            moments = self._moments(plan, np.flatnonzero(plan.redrawn[matrix]), dense)
        elementwise_redraw(out, dense, self.streams("redraw", expert, matrix), self.options.reinit_fraction, moments)
        return out

    def _moments(self, plan: NeuronPlan, rows: npt.NDArray[np.intp], dense: DenseMatrix) -> tuple[float, float]:
        return redraw_moments(plan, rows, dense, self.options.statistics, self.context.initializer_range)


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("qwen2", Qwen2Options, Qwen2Experts)]
