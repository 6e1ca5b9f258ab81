"""Shared experts that know nothing of the dense FFN: drawn (`random`), or drawn and silent (`zero`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import MATRICES, NO_SOURCE, DenseMatrix, NeuronPlan, SharedInitialiser, UpcycleContext
from moelab_upcycling.neurons import Streams, drawn_rows
from moelab_upcycling.shared_gate import Gate, GateOptions


@dataclass
class RandomSharedOptions(GateOptions):
    gain: float | None = 1.0
    std: float | None = None  # None: the model's initializer_range


class RandomShared:
    """Every value ~ N(0, std^2)."""

    down_is_zero = False

    def __init__(self, options: RandomSharedOptions, context: UpcycleContext) -> None:
        self.width = context.shared_intermediate_size
        self.std = context.initializer_range if options.std is None else options.std
        self.streams = Streams(context.seed, "shared/random/1", context.layer_id)
        self._gate = Gate(options, context)
        self.gain, self.warnings = self._gate.gain, self._gate.warnings

    def plan(self) -> NeuronPlan:
        drawn = np.ones(self.width, dtype=bool)
        return NeuronPlan(np.full(self.width, NO_SOURCE, dtype=np.int32), dict.fromkeys(MATRICES, drawn))

    def materialise(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        if matrix == "down" and self.down_is_zero:
            return np.zeros((self.width, dense.values.shape[1]), dtype=dense.values.dtype)
        return drawn_rows(self.width, dense, self.streams("redraw", matrix=matrix), (0.0, self.std))

    def gate(self) -> npt.NDArray[np.float32]:
        return self._gate.weight(self.streams)


class ZeroShared(RandomShared):
    """Adds nothing at first, for recipes whose routed experts are the whole FFN: Qwen2-MoE always has a shared one."""

    down_is_zero = True


@hookimpl
def moelab_shared_initialisers() -> list[Component[UpcycleContext, SharedInitialiser]]:
    return [component("random", RandomSharedOptions, RandomShared), component("zero", RandomSharedOptions, ZeroShared)]
