"""The dense FFN in every expert, and a light difference of its own: a few values, a low rank, or few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import DenseMatrix, ExpertInitialiser, NeuronPlan, UpcycleContext
from moelab_upcycling.dense import statistics
from moelab_upcycling.dtypes import from_float32, to_float32
from moelab_upcycling.neurons import Streams, check_choice, nothing_redrawn
from moelab_upcycling.streams import normals

FORMS = ("sparse", "low_rank", "quantised")
SMALL = 0.02  # a scale that 30 trained layers bear: KL 0.008 nats in form low_rank (docs/upcycling.md)
_ROWS = 256  # at a time; a multiple of four, so that pieces don't change the draws


@dataclass
class DeltasOptions:
    form: str = "sparse"  # sparse, low_rank, or of several sources quantised
    density: float = 0.01  # sparse: of each row's values, at least one
    rank: int = 4  # low_rank
    bits: int = 4  # quantised: of each value, beside one scale a row
    scale: float = 0.02  # of one source: standard deviation of what is drawn, in that of the matrix

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {self.density}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2 .. 8, not {self.bits}")
        if self.scale < 0:
            raise ValueError(f"scale must not be negative, not {self.scale}")


class DeltaExperts:
    """Expert e is W + D_e: of one source D_e is drawn, of several it is what source e has beyond the first, made light.

    Formula: one source: sparse: N(0, (scale std)^2) in `density` of each row's places, 0 elsewhere; low_rank:
    scale std A B / sqrt(rank) with A and B ~ N(0, 1). Several: D = W_s - W_0 with s = 1 + e mod (sources - 1); sparse:
    the largest `density` of each row's values; low_rank: the first `rank` terms of its singular value decomposition;
    quantised: each row rounded to 2^bits - 1 levels, evenly over +- its largest value.
    Source: DeRS (2503.01359; abstract and introduction opened, not its method): one weight shared by all experts and
    for each a delta in light form, sparse or of low rank while training, sparsified or quantised afterwards. Which
    values its sparsification keeps and how it starts what it trains could not be read: what stands above is ours.
    Departure: the experts are written out whole, so what is light here is their difference, not the memory; a run
    that trains differences alone is train.adapters'.
    Use: experts that begin nearly alike, and apart by a known amount; or several fine-tuned models of one base as
    experts, to see what a compressed difference still holds.
    Cost: sparse: one draw of 8 bytes for each value of the matrices; low_rank of several sources: an SVD of each matrix
    of each expert, whose last bits are the linear algebra library's (as `svd`).
    """

    def __init__(self, options: DeltasOptions, context: UpcycleContext) -> None:
        self.options, self.context, self.width = options, context, context.layout.moe_intermediate_size
        self.streams = Streams(context.seed, "experts/deltas/1", context.layer_id)
        self._base: Callable[[str], DenseMatrix] | None = None
        if self.width != context.intermediate_size:
            raise ConfigError(
                f"experts are the whole FFN and a difference, so moe_intermediate_size must be the dense FFN's "
                f"{context.intermediate_size}, not {self.width}; take svd, qwen2 or split for other widths"
            )
        if context.num_sources == 1 and options.form == "quantised":
            raise ConfigError("form quantised is of several sources; write source=[BASE, DIR, ...], or take sparse")
        beside = {"shared": ("zero",), "scaling": ("none",)}
        alone = context.num_sources == 1 and context.norm_topk_prob
        self.keeps_with = beside if alone and options.scale == 0 else None
        self.nearly_with = beside if alone and 0 < options.scale <= SMALL else None

    def prepare(self, load: Callable[[str], DenseMatrix]) -> None:
        """`load`: the first source's matrices, which are the base."""
        self._base = load

    def plan(self, expert: int) -> NeuronPlan:
        others = self.context.num_sources - 1
        order = np.arange(self.width, dtype=np.int32)
        return NeuronPlan(order, nothing_redrawn(self.width), checkpoint=1 + expert % others if others else 0)

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        if self.context.num_sources == 1:
            return self._drawn(expert, matrix, dense)
        assert self._base is not None, "prepare() comes first"
        base = self._base(matrix)
        first = to_float32(base.values, base.dtype)
        delta = _light(to_float32(dense.values, dense.dtype) - first, self.options)
        return from_float32(first + delta, dense.dtype)

    def _drawn(self, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        options, (count, width) = self.options, dense.values.shape
        out = dense.values.copy()
        if options.scale == 0:
            return out
        std = options.scale * statistics(dense)[1]
        if options.form == "low_rank":
            left = normals(self.streams("left", expert, matrix), (count, options.rank), 0.0, 1.0, "F32")
            right = normals(self.streams("right", expert, matrix), (options.rank, width), 0.0, 1.0, "F32")
            right *= np.float32(std * options.rank**-0.5)
        places, values = self.streams("places", expert, matrix), self.streams("values", expert, matrix)
        kept = _kept(options, width)
        for start in range(0, count, _ROWS):
            rows = slice(start, min(start + _ROWS, count))
            now = to_float32(out[rows], dense.dtype)
            if options.form == "low_rank":  # term after term: in which order a product sums is the library's
                for column, row in zip(left[rows].T, right, strict=True):
                    now = now + column[:, None] * row
            else:
                size = len(now)
                keys = places.random_raw(size * width).reshape(size, width)
                chosen = np.sort(np.argpartition(keys, kept - 1, axis=1)[:, :kept], axis=1)
                drawn = normals(values, (size, -(-kept // 4) * 4), 0.0, std, "F32")[:, :kept]
                now = now.copy()
                np.put_along_axis(now, chosen, np.take_along_axis(now, chosen, 1) + drawn, 1)
            out[rows] = from_float32(now, dense.dtype)
        return out


def _kept(options: DeltasOptions, width: int) -> int:
    """Values of a row that a sparse difference has."""
    return max(1, round(options.density * width))


def _light(delta: npt.NDArray[np.float32], options: DeltasOptions) -> npt.NDArray[np.float32]:
    """A difference [n, D] in its light form, written out."""
    if options.form == "low_rank":
        left, values, right = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        rank = options.rank
        product: npt.NDArray[np.float32] = ((left[:, :rank] * values[:rank]) @ right[:rank]).astype(np.float32)
        return product
    size = np.abs(delta)
    if options.form == "sparse":
        kept = _kept(options, delta.shape[1])
        largest = np.argpartition(-size, kept - 1, axis=1)[:, :kept]
        sparse = np.zeros_like(delta)
        np.put_along_axis(sparse, largest, np.take_along_axis(delta, largest, 1), 1)
        return sparse
    levels = np.float32(2 ** (options.bits - 1) - 1)
    step = size.max(axis=1, keepdims=True) / levels
    step[step == 0] = 1  # a row without a difference
    rounded: npt.NDArray[np.float32] = np.rint(delta / step) * step
    return rounded


@hookimpl
def moelab_expert_initialisers() -> list[Component[UpcycleContext, ExpertInitialiser]]:
    return [component("deltas", DeltasOptions, DeltaExperts)]
