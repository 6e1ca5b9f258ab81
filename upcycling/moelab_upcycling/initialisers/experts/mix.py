"""Branch-Train-MiX (Sukhbaatar et al. 2024, 2403.07816): experts from several dense checkpoints of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.assignment import cut_from_copies
from moelab_upcycling.neurons import (
    Streams,
    check_choice,
    check_fraction,
    check_width,
    choose_redrawn,
    drawn_rows,
    planned_rows,
    redraw_moments,
)


@dataclass
class MixOptions:
    assign: str = (
        "block"  # block: the first experts from the first source, and so on; interleaved: expert e from e mod m
    )
    reinit_fraction: float = 0.0  # of each expert's neurons, redrawn as `qwen2` does

    def __post_init__(self) -> None:
        check_choice("assign", self.assign, ("block", "interleaved"))
        check_fraction("reinit_fraction", self.reinit_fraction)


class MixedExperts:
    """Each expert from one source: whole FFNs in their own order, or cut from shuffled copies where narrower."""

    def __init__(self, options: MixOptions, context: UpcycleContext) -> None:
        self.options, self.context = options, context
        self.width, self.experts = context.layout.moe_intermediate_size, context.layout.num_experts
        self.streams = Streams(context.seed, "experts/mix/1", context.layer_id)
        if context.num_sources < 2:
            raise ConfigError("mixes several dense checkpoints; write source=[DIR, DIR, ...]")
        if self.experts < context.num_sources:
            raise ConfigError(f"{self.experts} experts can't hold {context.num_sources} sources")
        check_width(self.width, context.intermediate_size, "use narrower experts")

    @cached_property
    def _homes(self) -> list[tuple[int, int]]:
        """(source, number among that source's experts) of each expert."""
        sources = self.context.num_sources
        if self.options.assign == "interleaved":
            return [(e % sources, e // sources) for e in range(self.experts)]
        owners = [e * sources // self.experts for e in range(self.experts)]
        return [(owner, owners[:e].count(owner)) for e, owner in enumerate(owners)]

    @cached_property
    def _assignments(self) -> list[npt.NDArray[np.int32]]:
        dense, found = self.context.intermediate_size, []
        for s in range(self.context.num_sources):
            count = sum(1 for owner, _ in self._homes if owner == s)
            if self.width == dense:
                found.append(np.tile(np.arange(dense, dtype=np.int32), (count, 1)))
                continue
            streams = Streams(self.context.seed, f"experts/mix/1/source{s}", self.context.layer_id)
            found.append(cut_from_copies(streams, dense, count, self.width, dedup=True))
        return found

    def plan(self, expert: int) -> NeuronPlan:
        owner, place = self._homes[expert]
        redrawn = choose_redrawn(self.streams, expert, self.width, self.options.reinit_fraction)
        return NeuronPlan(self._assignments[owner][place], redrawn, checkpoint=owner)

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """The rows that the plan marks [k, D]; the others are copies."""
        rows = np.flatnonzero(plan.redrawn[matrix])
        moments = redraw_moments(plan, rows, dense, "dropped", 0)
        return drawn_rows(len(rows), dense, self.streams("redraw", expert, matrix), moments)

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, expert, matrix, dense))


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("mix", MixOptions, MixedExperts)]
