"""The routed experts as they come: with a shared expert that is the dense FFN, the best start measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moelab import Component, component, hookimpl
from moelab.initialisers import OutputScaling, UpcycleContext


@dataclass
class NoneOptions:
    """No options."""


class NoScaling:
    """No factor; the shared expert is to give the whole dense output."""

    share = 0.0

    def __init__(self, options: NoneOptions, context: UpcycleContext) -> None:
        pass

    def factors(self, context: UpcycleContext, logit_std: float) -> Mapping[str, float]:
        return {}


@hookimpl
def moelab_output_scalings() -> list[Component[UpcycleContext, OutputScaling]]:
    return [component("none", NoneOptions, NoScaling)]
