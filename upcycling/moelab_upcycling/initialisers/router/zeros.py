"""A router that prefers nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import RouterInitialiser, UpcycleContext


@dataclass
class ZerosOptions:
    """No options."""


class ZeroRouter:
    """All logits equal: every token takes the same experts until something breaks the tie."""

    std = 0.0

    def __init__(self, options: ZerosOptions, context: UpcycleContext) -> None:
        self.shape = (context.layout.num_experts, context.hidden_size)
        self.warnings = ["a zero router sends every token to the same experts; train it with noise"]

    def weight(self) -> npt.NDArray[np.float32]:
        return np.zeros(self.shape, dtype=np.float32)


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("zeros", ZerosOptions, ZeroRouter)]
