"""Random noise upcycling, the baseline of the Drop-Upcycling code: permuted copies, with noise added to a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.dense import statistics
from moelab_upcycling.neurons import (
    INDEX_SETS,
    Streams,
    add_noise,
    check_choice,
    check_fraction,
    check_width,
    choose_redrawn,
)
from moelab_upcycling.streams import permutation


@dataclass
class NoiseOptions:
    fraction: float = 0.5  # of the neurons that get noise
    sigma: float = 0.02  # of the noise
    sigma_relative: float | None = None  # instead of sigma: in units of the dense matrix's own std
    index_sets: str = "independent"  # as that code does: other neurons in gate, up and down; or shared

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_choice("index_sets", self.index_sets, INDEX_SETS)
        if self.sigma < 0 or (self.sigma_relative or 0) < 0:
            raise ValueError("sigma and sigma_relative must not be negative")


class NoiseExperts:
    """W + N(0, sigma^2) in a part of the neurons, W in the rest."""

    def __init__(self, options: NoiseOptions, context: UpcycleContext) -> None:
        self.options, self.dense_width = options, context.intermediate_size
        self.width = context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/noise/1", context.layer_id)
        check_width(self.width, self.dense_width, "use narrower experts")

    def plan(self, expert: int) -> NeuronPlan:
        """`redrawn` marks the neurons with noise."""
        source = permutation(self.streams("shuffle", expert), self.dense_width)[: self.width]
        independent = self.options.index_sets == "independent"
        noisy = choose_redrawn(self.streams, expert, self.width, self.options.fraction, independent=independent)
        return NeuronPlan(source, noisy)

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        out = dense.values[plan.source]
        sigma = self.options.sigma
        if self.options.sigma_relative is not None:
            sigma = self.options.sigma_relative * statistics(dense)[1]
        add_noise(out, np.flatnonzero(plan.redrawn[matrix]), dense, self.streams("noise", expert, matrix), sigma)
        return out


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("noise", NoiseOptions, NoiseExperts)]
