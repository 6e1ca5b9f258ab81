"""The shared expert as the dense FFN itself: the default, and what makes the start the dense model's function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import MATRICES, NO_SOURCE, DenseMatrix, NeuronPlan, SharedInitialiser, UpcycleContext
from moelab_upcycling.dense import statistics
from moelab_upcycling.neurons import Streams, check_choice, drawn_rows, planned_rows
from moelab_upcycling.shared_gate import Gate, GateOptions
from moelab_upcycling.streams import permutation


@dataclass
class CopyOptions(GateOptions):
    extra: str = "zero_down"  # neurons beyond the dense ones: zero_down leaves the function as it is; random does not

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("extra", self.extra, ("zero_down", "random"))


class CopiedShared:
    """The dense neurons verbatim and in order, then new ones with gate and up like the dense and down zero."""

    def __init__(self, options: CopyOptions, context: UpcycleContext) -> None:
        self.options, self.context = options, context
        self.streams = Streams(context.seed, "shared/copy/1", context.layer_id)
        self._gate = Gate(options, context)
        self.gain, self.warnings = self._gate.gain, list(self._gate.warnings)
        holds_all = context.shared_intermediate_size >= context.intermediate_size
        self.whole = self._gate.exact and options.extra == "zero_down" and holds_all
        if not holds_all:
            self.warnings.append(
                f"the shared expert holds {context.shared_intermediate_size} of {context.intermediate_size} dense "
                "neurons, chosen at random: it does not reproduce the dense FFN"
            )

    def plan(self) -> NeuronPlan:
        width, dense = self.context.shared_intermediate_size, self.context.intermediate_size
        if width < dense:
            source = permutation(self.streams("subset"), dense)[:width]
        else:
            source = np.full(width, NO_SOURCE, dtype=np.int32)
            source[:dense] = np.arange(dense)
        return NeuronPlan(source, dict.fromkeys(MATRICES, source == NO_SOURCE))

    def redrawn(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """The neurons beyond the dense ones [k, D]; the others are copies."""
        extra = int(plan.redrawn[matrix].sum())
        if (matrix == "down" and self.options.extra == "zero_down") or not extra:
            return np.zeros((extra, dense.values.shape[1]), dense.values.dtype)
        return drawn_rows(extra, dense, self.streams("extra", matrix=matrix), statistics(dense))

    def materialise(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, matrix, dense))

    def gate(self) -> npt.NDArray[np.float32]:
        return self._gate.weight(self.streams)


@hookimpl
def moelab_shared_initialisers() -> list[Component[UpcycleContext, SharedInitialiser]]:
    return [component("copy", CopyOptions, CopiedShared)]
