"""Splitting the dense FFN into experts without copies (MoEfication 2110.01786, LLaMA-MoE 2406.16554)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.balanced_kmeans import balanced_kmeans
from moelab_upcycling.neurons import Streams, check_choice, nothing_redrawn, planned_rows
from moelab_upcycling.streams import permutation


@dataclass
class SplitOptions:
    by: str = "random"  # contiguous, random, or kmeans of the neurons' normalised rows
    kmeans_matrix: str = "gate"  # whose rows are clustered: gate or up
    kmeans_rounds: int = 10

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("contiguous", "random", "kmeans"))
        check_choice("kmeans_matrix", self.kmeans_matrix, ("gate", "up"))
        if self.kmeans_rounds < 1:
            raise ValueError(f"kmeans_rounds must be at least 1, not {self.kmeans_rounds}")


class SplitExperts:
    """Each dense neuron in exactly one expert: with all experts on at weight 1 the dense FFN, exactly."""

    def __init__(self, options: SplitOptions, context: UpcycleContext) -> None:
        self.options, layout = options, context.layout
        self.experts, self.width = layout.num_experts, layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/split/1", context.layer_id)
        if self.experts * self.width != context.intermediate_size:
            raise ConfigError(
                f"the experts must make up the dense FFN of {context.intermediate_size}, and {self.experts} of "
                f"{self.width} make {self.experts * self.width}"
            )
        if options.by != "kmeans":
            order = np.arange(context.intermediate_size, dtype=np.int32)
            if options.by == "random":
                order = permutation(self.streams("shuffle"), context.intermediate_size)
            self.parts = order.reshape(self.experts, self.width)

    def prepare(self, load: Callable[[str], DenseMatrix]) -> None:
        """k-means needs the weights before it can plan."""
        if self.options.by == "kmeans":
            dense = load(self.options.kmeans_matrix)
            start = permutation(self.streams("centroids"), len(dense.values))[: self.experts]
            self.parts = balanced_kmeans(dense, start, self.options.kmeans_rounds)

    def plan(self, expert: int) -> NeuronPlan:
        return NeuronPlan(self.parts[expert], nothing_redrawn(self.width))

    def redrawn(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """None of them."""
        return dense.values[:0]

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        return planned_rows(plan, matrix, dense.values, self.redrawn(plan, expert, matrix, dense))


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("split", SplitOptions, SplitExperts)]
