"""The shared expert as if it were so many more routed ones: the other reading of the Qwen2 report, with 10 copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import MATRICES, DenseMatrix, NeuronPlan, SharedInitialiser, UpcycleContext
from moelab_upcycling.assignment import cut_from_copies
from moelab_upcycling.neurons import Streams, check_fraction, choose_redrawn, drawn_rows, planned_rows, redraw_moments
from moelab_upcycling.shared_gate import Gate, GateOptions


@dataclass
class Qwen2SharedOptions(GateOptions):
    gate: str = "normal"  # as Hugging Face initialises it
    reinit_fraction: float = 0.5  # redrawing the shared expert costs most of the dense model's function

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("reinit_fraction", self.reinit_fraction)


class Qwen2Shared:
    """ceil(width / expert width) more experts from the same copies as `experts: qwen2`, each partly redrawn."""

    def __init__(self, options: Qwen2SharedOptions, context: UpcycleContext) -> None:
        self.options, self.context = options, context
        self.width = context.shared_intermediate_size
        # The experts' own copies: the shared ones are cut where the routed ones end.
        self.copies = Streams(context.seed, "experts/qwen2/1", context.layer_id)
        self.streams = Streams(context.seed, "shared/qwen2/1", context.layer_id)
        self._gate = Gate(options, context)
        self.gain = self._gate.gain
        self.warnings = [*self._gate.warnings]
        if options.reinit_fraction > 0:
            self.warnings.append("the shared expert is partly redrawn: the start is far from the dense model")

    def plan(self) -> NeuronPlan:
        layout, dense = self.context.layout, self.context.intermediate_size
        width = min(layout.moe_intermediate_size, dense)
        more = -(-self.width // width)
        cut = cut_from_copies(self.copies, dense, layout.num_experts + more, width, dedup=True)
        source = cut[layout.num_experts :].reshape(-1)[: self.width]
        sets = [choose_redrawn(self.streams, e, width, self.options.reinit_fraction)["gate"] for e in range(more)]
        return NeuronPlan(source, dict.fromkeys(MATRICES, np.concatenate(sets)[: self.width]))

    def redrawn(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """The rows that the plan marks [k, D]; the others are copies."""
        rows = np.flatnonzero(plan.redrawn[matrix])
        moments = redraw_moments(plan, rows, dense, "dropped", 0)
        return drawn_rows(len(rows), dense, self.streams("redraw", matrix=matrix), moments)

    def materialise(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, matrix, dense))

    def gate(self) -> npt.NDArray[np.float32]:
        return self._gate.weight(self.streams)


@hookimpl
def moelab_shared_initialisers() -> list[Component[UpcycleContext, SharedInitialiser]]:
    return [component("qwen2", Qwen2SharedOptions, Qwen2Shared)]
