"""Shards of the dense FFN whose copies differ in their small singular values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import NO_SOURCE, DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.dtypes import to_float32
from moelab_upcycling.initialisers.experts._shards import Shards
from moelab_upcycling.neurons import Streams
from moelab_upcycling.streams import normals


@dataclass
class SVDOptions:
    kept: int = 8  # largest singular values that stay, of each matrix of an expert
    scale: float = 0.5  # of the noise on the others, in their mean

    def __post_init__(self) -> None:
        if self.kept < 0 or self.scale < 0:
            raise ValueError(f"kept and scale must not be negative, not {self.kept} and {self.scale}")


class SVDExperts(Shards):
    """Expert e holds shard e mod G; of each of its matrices the small singular values get noise of their own.

    Formula: W = U diag(s) V^T of the shard's rows; s_i + N(0, (scale * mean of s beyond `kept`)^2) for i >= kept.
    Source: simjay/structural-moe-upcycling (dafd9c7, src/qwen15/upcycle.py, k 8 and svd_scale 0.5), which cuts the FFN
    as it stands and fills the last shard with zeros; here it is shuffled once, as virtual_group has it, and silent
    neurons fill it. Amazon's expert-upcycling (d42f7c6, svd_perturb) moves all singular values, and vectors too.
    Use: copies that differ, where what is large of a matrix is the same in all of them. With scale 0 it is
    virtual_group.
    Cost: a singular value decomposition in float64 of each matrix of each expert: minutes an expert at 2560 x 3584.
    Its last bits are the linear algebra library's: in bfloat16 they are lost, in float32 `moelab verify` on another
    machine may find some.
    """

    def __init__(self, options: SVDOptions, context: UpcycleContext) -> None:
        super().__init__(context)
        self.svd, self.noise = options, Streams(context.seed, "experts/svd/1", context.layer_id)
        if options.scale > 0:
            self.keeps_with = None

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        out = super().materialise(plan, expert, matrix, dense)
        if self.svd.scale == 0:
            return out
        rows = np.flatnonzero(plan.source != NO_SOURCE)
        found = to_float32(out, dense.dtype)
        left, values, right = np.linalg.svd(found[rows].astype(np.float64), full_matrices=False)
        small = values[self.svd.kept :]
        if len(small):
            noise = normals(self.noise("noise", expert, matrix), (1, len(small)), 0.0, 1.0, "F32")[0]
            values[self.svd.kept :] = small + self.svd.scale * small.mean() * noise.astype(np.float64)
        found[rows] = ((left * values) @ right).astype(np.float32)
        return found


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("svd", SVDOptions, SVDExperts)]
