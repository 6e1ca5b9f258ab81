"""Sparse upcycling (Komatsuzaki et al. 2022, 2212.05055): every expert is the dense FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.neurons import Streams, nothing_redrawn, planned_rows
from moelab_upcycling.streams import permutation


@dataclass
class SparseOptions:
    shuffle: bool = False  # each expert's neurons in an order of its own: the same function


class SparseExperts:
    """Identical copies of the dense FFN. Exactly its function where the top-k weights sum to one."""

    def __init__(self, options: SparseOptions, context: UpcycleContext) -> None:
        self.options, self.width = options, context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/sparse/1", context.layer_id)
        if self.width != context.intermediate_size:
            raise ConfigError(
                f"experts are whole copies, so moe_intermediate_size must be the dense FFN's "
                f"{context.intermediate_size}, not {self.width}; take qwen2, drop or split for other widths"
            )
        self.keeps_with = {"shared": ("zero",), "scaling": ("none",)} if context.norm_topk_prob else None
        self.warnings = [] if context.norm_topk_prob else ["weights don't sum to one (norm_topk_prob false)"]

    def plan(self, expert: int) -> NeuronPlan:
        order = np.arange(self.width, dtype=np.int32)
        if self.options.shuffle:
            order = permutation(self.streams("shuffle", expert), self.width)
        return NeuronPlan(order, nothing_redrawn(self.width))

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """None of them."""
        return dense.values[:0]

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, expert, matrix, dense))


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("sparse", SparseOptions, SparseExperts)]
