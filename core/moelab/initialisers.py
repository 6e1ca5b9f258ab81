"""The contracts of upcycling: how dense weights become expert weights, along four axes that compose.

An initialiser first makes a plan from shapes and a seed alone, which can be tested and stored without any
weights; then the plan is applied to one matrix at a time. F is the dense FFN width, n the number of neurons asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from moelab.moe.layout import ExpertLayout


@dataclass(frozen=True)
class UpcycleContext:
    """What an initialiser may depend on; one for each MoE layer of the target."""

    hidden_size: int
    intermediate_size: int  # F, of the dense source
    layer_id: int
    num_hidden_layers: int
    layout: ExpertLayout
    shared_intermediate_size: int | None  # None: no shared expert
    norm_topk_prob: bool
    initializer_range: float
    seed: int
    num_sources: int = 1  # dense checkpoints that are mixed


@runtime_checkable
class ExpertInitialiser(Protocol):
    """The routed experts of one layer."""

    def plan(self, expert: int) -> Any:
        """Which dense neuron each of this expert's neurons comes from, and which are redrawn."""
        ...

    def materialise(self, plan: Any, matrix: str, dense: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One matrix ("gate", "up", "down") of the planned expert, neuron-major.

        dense [F, D] holds bf16 or fp32 values with one row a neuron (down_proj transposed) -> [n, D].
        """
        ...


@runtime_checkable
class SharedInitialiser(Protocol):
    """The shared expert of one layer: the same two steps, and the value of its gate."""

    gain: float  # factor on down, see reference upcycling.md 1.9
    gate_value: float

    def plan(self) -> Any: ...

    def materialise(self, plan: Any, matrix: str, dense: npt.NDArray[Any]) -> npt.NDArray[Any]: ...


@runtime_checkable
class RouterInitialiser(Protocol):
    """The router matrix of one layer."""

    def weight(self) -> npt.NDArray[np.float32]:
        """-> [num_experts, hidden_size] fp32."""
        ...


@runtime_checkable
class OutputScaling(Protocol):
    """The factor on every routed expert's down projection."""

    def scale(self, context: UpcycleContext, router_std: float) -> float: ...
