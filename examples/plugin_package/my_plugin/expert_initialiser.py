"""An initialiser of upcycled experts: each takes neighbouring neurons of the dense layer. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import MATRICES, DenseMatrix, NeuronPlan, UpcycleContext


@dataclass
class Options:
    stride: int = 1  # how many neurons further the next expert begins, in widths of an expert

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride: must be at least 1, not {self.stride}")


class MyExpertInitialiser:
    """Expert e has the n neurons from e * stride * n on, round and round. Nothing is drawn.

    F neurons of the dense layer, n of an expert, D hidden size.
    """

    def __init__(self, options: Options, context: UpcycleContext) -> None:
        self.stride = options.stride
        self.width, self.dense_width = context.layout.moe_intermediate_size, context.intermediate_size

    def plan(self, expert: int) -> NeuronPlan:
        """Which dense neuron each of this expert's n is, and which are drawn anew (none): from shapes and a seed."""
        first = expert * self.stride * self.width
        source = ((first + np.arange(self.width)) % self.dense_width).astype(np.int32)
        return NeuronPlan(source, dict.fromkeys(MATRICES, np.zeros(self.width, np.bool_)))

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """One matrix of the expert -> [n, D], in the dense one's type."""
        return dense.values[plan.source]


@hookimpl
def moelab_expert_initialisers() -> list[Component]:
    return [component("my_expert_initialiser", Options, MyExpertInitialiser)]
