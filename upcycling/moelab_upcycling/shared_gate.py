"""The gate of a shared expert, and the factor on its down matrix that undoes the gate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab.initialisers import UpcycleContext
from moelab_upcycling.neurons import Streams, check_choice
from moelab_upcycling.streams import normals


@dataclass
class GateOptions:
    gate: str = "constant"  # constant, or normal: N(0, initializer_range^2), as Hugging Face initialises it
    gate_value: float = 1e-12  # of `constant`: sigmoid is 1/2 in every format. Exact zeros are NaN in llama.cpp
    gain: float | None = None  # on down. None: what makes up for the constant gate and the routed experts' share

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, ("constant", "normal"))


class Gate:
    """sigmoid(1e-12 x) = 1/2, so twice the down matrix gives the dense output exactly: doubling loses no bit."""

    def __init__(self, options: GateOptions, context: UpcycleContext) -> None:
        self.options, self.context = options, context
        automatic = 2.0 * (1.0 - context.routed_share) if options.gate == "constant" else 1.0
        self.gain = automatic if options.gain is None else options.gain
        # A constant of 1e-12 or 0: its sigmoid is 1/2 whatever x is, and the gain makes up for it.
        self.exact = options.gate == "constant" and abs(options.gate_value) < 1e-6 and self.gain == automatic
        self.warnings = []
        if options.gate == "constant" and options.gate_value == 0:
            self.warnings.append("llama.cpp: a shared gate of exact zeros is NaN there; leave gate_value at 1e-12")

    def weight(self, streams: Streams) -> npt.NDArray[np.float32]:
        """-> [1, D]."""
        shape = (1, self.context.hidden_size)
        if self.options.gate == "normal":
            return normals(streams("gate"), shape, 0.0, self.context.initializer_range, "F32")
        return np.full(shape, self.options.gate_value, dtype=np.float32)
