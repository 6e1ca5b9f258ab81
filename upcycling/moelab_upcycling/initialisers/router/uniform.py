"""Uniform routers: Drop-Upcycling's centred one, and torch's default for a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelab import Component, component, hookimpl
from moelab.initialisers import RouterInitialiser, UpcycleContext
from moelab_upcycling.neurons import Streams
from moelab_upcycling.streams import uniforms


@dataclass
class CentredUniformOptions:
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.std < 0:
            raise ValueError(f"std must not be negative, not {self.std}")


@dataclass
class UniformLinearOptions:
    """No options."""


class CentredUniformRouter:
    """(U - mean U) * std * sqrt(12), as Drop-Upcycling's `torch_rand_002`."""

    def __init__(self, options: CentredUniformOptions, context: UpcycleContext) -> None:
        self.std = options.std
        self.shape = (context.layout.num_experts, context.hidden_size)
        self.streams = Streams(context.seed, "router/centred_uniform/1", context.layer_id)

    def weight(self) -> npt.NDArray[np.float32]:
        values = uniforms(self.streams("router"), self.shape)
        return ((values - values.mean()) * (self.std * 12**0.5)).astype(np.float32)


class UniformLinearRouter:
    """U(-1/sqrt(D), 1/sqrt(D)): torch.nn.Linear's default, kaiming with a = sqrt(5)."""

    def __init__(self, options: UniformLinearOptions, context: UpcycleContext) -> None:
        self.limit = context.hidden_size**-0.5
        self.std = self.limit / 3**0.5
        self.shape = (context.layout.num_experts, context.hidden_size)
        self.streams = Streams(context.seed, "router/uniform_linear/1", context.layer_id)

    def weight(self) -> npt.NDArray[np.float32]:
        return ((2 * uniforms(self.streams("router"), self.shape) - 1) * self.limit).astype(np.float32)


@hookimpl
def moelab_router_initialisers() -> list[Component[UpcycleContext, RouterInitialiser]]:
    return [
        component("centred_uniform", CentredUniformOptions, CentredUniformRouter),
        component("uniform_linear", UniformLinearOptions, UniformLinearRouter),
    ]
