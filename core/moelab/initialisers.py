"""The contracts of upcycling: how dense weights become expert weights, along four axes that compose.

An initialiser first makes a plan from shapes and a seed alone, which can be tested and stored without any
weights; then the plan is applied to one matrix at a time. F is the width of the dense FFN, D the hidden size,
n the number of neurons asked for. A neuron j is gate row j, up row j and down column j; here all three
matrices are neuron-major, so that a neuron is always a row (down_proj is handed over transposed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from moelab.moe.layout import ExpertLayout

MATRICES = ("gate", "up", "down")
NO_SOURCE = -1  # in NeuronPlan.source: a neuron that comes from nowhere


@dataclass(frozen=True)
class UpcycleContext:
    """What an initialiser may depend on; one for each MoE layer of the target."""

    hidden_size: int
    intermediate_size: int  # F, of the dense source
    layer_id: int
    num_hidden_layers: int
    layout: ExpertLayout
    shared_intermediate_size: int
    norm_topk_prob: bool
    initializer_range: float
    seed: int
    num_sources: int = 1  # dense checkpoints that are mixed
    routed_share: float = 0.0  # of the dense output, that `recipe.scaling` gives to the routed experts


@dataclass(frozen=True)
class NeuronPlan:
    """Where each of n neurons comes from, and which of its three matrices' rows are not copied but redrawn."""

    source: npt.NDArray[np.int32]  # [n] neuron of the dense FFN, or NO_SOURCE
    redrawn: Mapping[str, npt.NDArray[np.bool_]]  # matrix -> [n]; one shared array where the sets are shared
    checkpoint: int = 0  # which of the mixed dense checkpoints

    def changed(self, matrix: str) -> npt.NDArray[np.bool_]:
        """-> [n], true where a row of this matrix is no dense neuron's."""
        return self.redrawn[matrix] | (self.source == NO_SOURCE)


class DenseMatrix(Protocol):
    """One FFN matrix of a dense layer in the dtype of the output, neuron-major."""

    values: npt.NDArray[Any]  # [F, D]; bfloat16 as its bits, uint16
    dtype: str  # as safetensors calls it: BF16, F16, F32

    def sums(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Sum and sum of squares of each neuron's row, [F] and [F]; computed once."""
        ...

    def float32(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """rows [n] -> [n, D]."""
        ...


@runtime_checkable
class ExpertInitialiser(Protocol):
    """The routed experts of one layer. Optional, looked up by name:

    - `prepare(load)`: called before the first plan where that depends on weights; load(matrix) -> DenseMatrix
    - `warnings`: sentences for the user, in the plan that is printed
    - `keeps_with`: {"shared", "router", "scaling": names} of the parts beside which the start is the dense function
    - `nearly_with`: the same where it is that function but for a small difference of each expert
    - `redrawn(plan, expert, matrix, dense)` -> [k, D], the rows of `materialise` that `plan.changed(matrix)` marks, in
      order, where all others are the planned dense rows bit for bit; None where they are not. The engine then copies
      those to where they are written, and does not call `materialise`, which is what defines both.
    """

    def plan(self, expert: int) -> NeuronPlan:
        """Which dense neuron each of this expert's neurons comes from, and which are redrawn."""
        ...

    def materialise(self, plan: NeuronPlan, expert: int, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]:
        """One matrix ("gate", "up", "down") of the planned expert -> [n, D], in dense's storage type or fp32."""
        ...


@runtime_checkable
class SharedInitialiser(Protocol):
    """The shared expert of one layer: the same two steps, a factor on down, and its gate. May offer `warnings`.

    `redrawn(plan, matrix, dense)` (optional) is as above. `whole` (optional) says that with its gain it gives all of
    the dense output but the routed experts' share.
    """

    gain: float  # on the down matrix

    def plan(self) -> NeuronPlan: ...

    def materialise(self, plan: NeuronPlan, matrix: str, dense: DenseMatrix) -> npt.NDArray[Any]: ...

    def gate(self) -> npt.NDArray[np.float32]:
        """-> [1, D]. Exactly zero everywhere is a NaN in llama.cpp."""
        ...


@runtime_checkable
class RouterInitialiser(Protocol):
    """The router matrix of one layer. May offer `prepare(prompts)` (see PromptReader) and `warnings`."""

    std: float  # of an entry, from which the expected top-k mass follows

    def weight(self) -> npt.NDArray[np.float32]:
        """-> [num_experts, hidden_size]."""
        ...


@dataclass(frozen=True)
class PromptReader:
    """What a router made from prompts may read of the source."""

    encode: Callable[[str], Sequence[int]]  # with the source's tokenizer.json
    embed: Callable[[Sequence[int]], npt.NDArray[np.float32]]  # token ids [T] -> [T, D]
    # (layer, token ids of each text) -> [T_i, D] of each: the residual stream that enters the layer
    hidden: Callable[[int, Sequence[Sequence[int]]], Sequence[npt.NDArray[np.float64]]]


@runtime_checkable
class OutputScaling(Protocol):
    """The factors on the routed experts' matrices."""

    share: float  # of the dense output that the routed experts are meant to give; the shared expert gives the rest

    def factors(self, context: UpcycleContext, logit_std: float) -> Mapping[str, float]:
        """{matrix: factor}; what is absent is 1. logit_std: of the router's logits, router std * ||norm weight||."""
        ...


def redrawn_of(part: object) -> Callable[..., npt.NDArray[Any] | None] | None:
    """`redrawn` of an initialiser that offers it; not where a class below overrides `materialise` alone."""
    for kind in type(part).__mro__:
        if "redrawn" in vars(kind):
            return part.redrawn  # type: ignore[attr-defined]
        if "materialise" in vars(kind):
            break
    return None
