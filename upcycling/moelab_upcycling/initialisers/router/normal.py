"""A router drawn as any other matrix of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import RouterInitialiser, UpcycleContext
from moelab_upcycling.neurons import Streams
from moelab_upcycling.streams import normals


@dataclass
class NormalOptions:
    std: float | None = None  # None: the model's initializer_range, 0.02 in Qwen2

    def __post_init__(self) -> None:
        if self.std is not None and self.std < 0:
            raise ValueError(f"std must not be negative, not {self.std}")


class NormalRouter:
    """Every value ~ N(0, std^2)."""

    def __init__(self, options: NormalOptions, context: UpcycleContext) -> None:
        self.std = context.initializer_range if options.std is None else options.std
        self.shape = (context.layout.num_experts, context.hidden_size)
        self.streams = Streams(context.seed, "router/normal/1", context.layer_id)

    def weight(self) -> npt.NDArray[np.float32]:
        return normals(self.streams("router"), self.shape, 0.0, self.std, "F32")


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("normal", NormalOptions, NormalRouter)]
