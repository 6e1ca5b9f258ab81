"""Experts from nothing: the baseline that upcycling has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import MATRICES, NO_SOURCE, DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.neurons import Streams, drawn_rows


@dataclass
class RandomOptions:
    std: float | None = None  # None: the model's initializer_range

    def __post_init__(self) -> None:
        if self.std is not None and self.std < 0:
            raise ValueError(f"std must not be negative, not {self.std}")


class RandomExperts:
    """Every value ~ N(0, std^2); no dense neuron is used."""

    def __init__(self, options: RandomOptions, context: UpcycleContext) -> None:
        self.std = context.initializer_range if options.std is None else options.std
        self.width = context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/random/1", context.layer_id)

    def plan(self, expert: int) -> NeuronPlan:
        everything = np.ones(self.width, dtype=bool)
        return NeuronPlan(np.full(self.width, NO_SOURCE, dtype=np.int32), dict.fromkeys(MATRICES, everything))

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return drawn_rows(self.width, dense, self.streams("redraw", expert, matrix), (0.0, self.std))


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("random", RandomOptions, RandomExperts)]
