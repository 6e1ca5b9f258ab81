"""A wider shared expert by duplication (Net2WiderNet, 1511.05641): exact, and no neuron starts at zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import MATRICES, DenseMatrix, NeuronPlan, SharedInitialiser, UpcycleContext
from moelab_upcycling.dtypes import scaled
from moelab_upcycling.neurons import Streams, planned_rows
from moelab_upcycling.shared_gate import Gate, GateOptions
from moelab_upcycling.streams import permutation


class DuplicatedShared:
    """The dense neurons, then random ones of them again; both of a pair with half their down."""

    def __init__(self, options: GateOptions, context: UpcycleContext) -> None:
        self.dense, self.width = context.intermediate_size, context.shared_intermediate_size
        self.streams = Streams(context.seed, "shared/dup/1", context.layer_id)
        self._gate = Gate(options, context)
        self.gain, self.warnings = self._gate.gain, self._gate.warnings
        self.whole = self._gate.exact
        if not self.dense <= self.width <= 2 * self.dense:
            raise ConfigError(
                f"model.moe.shared_expert.intermediate_size {self.width} must be between the dense FFN's {self.dense} "
                f"and {2 * self.dense}: a neuron is duplicated once at most"
            )

    def plan(self) -> NeuronPlan:
        again = permutation(self.streams("again"), self.dense)[: self.width - self.dense]
        source = np.concatenate([np.arange(self.dense, dtype=np.int32), again])
        return NeuronPlan(source, dict.fromkeys(MATRICES, np.zeros(self.width, dtype=bool)))

    def materialise(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        out = planned_rows(plan, matrix, dense.values, dense.values[:0])
        if matrix == "down":
            twins = np.concatenate([plan.source[self.dense :], np.arange(self.dense, self.width)])
            out[twins] = scaled(out[twins], dense.dtype, 0.5)
        return out

    def gate(self) -> npt.NDArray[np.float32]:
        return self._gate.weight(self.streams)


@hookimpl
def moelab_shared_initialisers() -> list[Component[UpcycleContext, SharedInitialiser]]:
    return [component("dup", GateOptions, DuplicatedShared)]
