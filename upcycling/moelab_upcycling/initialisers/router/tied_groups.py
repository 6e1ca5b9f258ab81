"""The router of virtual groups (He et al. 2024): equal rows for the experts that make up one dense FFN."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, ConfigError, component, hookimpl
from moelab.initialisers import RouterInitialiser, UpcycleContext
from moelab_upcycling.neurons import Streams
from moelab_upcycling.streams import normals


@dataclass
class TiedGroupsOptions:
    std: float | None = None  # None: the model's initializer_range
    group: int | None = None  # experts in a group; None: as many as make up the dense FFN

    def __post_init__(self) -> None:
        if (self.std or 0) < 0 or (self.group is not None and self.group < 1):
            raise ValueError("std must not be negative, group must be at least 1")


class TiedGroupsRouter:
    """num_experts / group rows ~ N(0, std^2), each for `group` consecutive experts: top-k takes whole groups."""

    def __init__(self, options: TiedGroupsOptions, context: UpcycleContext) -> None:
        layout = context.layout
        self.group = options.group or -(-context.intermediate_size // layout.moe_intermediate_size)
        self.std = context.initializer_range if options.std is None else options.std
        if layout.num_experts % self.group:
            raise ConfigError(f"groups of {self.group} do not divide num_experts {layout.num_experts}; set group")
        self.shape = (layout.num_experts // self.group, context.hidden_size)
        self.streams = Streams(context.seed, "router/tied_groups/1", context.layer_id)

    def weight(self) -> npt.NDArray[np.float32]:
        return normals(self.streams("router"), self.shape, 0.0, self.std, "F32").repeat(self.group, axis=0)


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [component("tied_groups", TiedGroupsOptions, TiedGroupsRouter)]
