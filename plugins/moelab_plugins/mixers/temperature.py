"""Shares between what there is and equal ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moelab import Component, MixContext, Mixer, Phase, component, hookimpl


@dataclass
class TemperatureOptions:
    temperature: float = 3.3  # 1: as much as there is; towards infinity: equal shares
    domains: list[str] | None = None  # that are read, patterns such as code_* or */yes too; null: all

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 1):
            raise ValueError(f"temperature: {self.temperature} is no number from 1 up; equal shares are `balanced`")


def temperature(options: TemperatureOptions, context: MixContext) -> Mixer:
    """A domain of n tokens gets a share that grows as n ** (1 / temperature).

    Source: the sampling of multilingual models, p(L) proportional to |L| ** alpha, alpha = 1 / temperature: mT5,
    2010.11934, section 3.2. The default is alpha 0.3, which others quote for it and for XLM-R (1911.02116); the lines
    that give it were not opened.
    Use: between what there is (1) and equal shares (`balanced`).
    Cost: none; what repeats is told when the run begins.
    """
    read = context.among(options.domains)
    largest = max(read.values())
    return Mixer([Phase({name: (n / largest) ** (1 / options.temperature) for name, n in read.items()})])


@hookimpl
def moelab_mixers() -> list[Component[MixContext, Mixer]]:
    return [component("temperature", TemperatureOptions, temperature)]
