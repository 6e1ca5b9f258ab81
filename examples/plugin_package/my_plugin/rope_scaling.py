"""A rope scaling: NTK-aware, a base that is larger by one factor whatever the text's length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab import Component, component, hookimpl

if TYPE_CHECKING:  # `moelab upcycle` reads these options without torch
    from torch import Tensor

    from moelab.config.rope_scaling import RopeContext


@dataclass
class Options:
    factor: float = 4.0  # how many times the trained length

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}")


class MyRopeScaling:
    """The fastest frequency is kept and the slowest divided by the factor, those between by a power of it."""

    length_matters = False  # the same frequencies for short texts and long ones

    def __init__(self, options: Options, context: RopeContext) -> None:
        self.reach = options.factor * context.max_position_embeddings
        grown = math.log(options.factor) * context.head_dim / (context.head_dim - 2)
        self.power = 1 + grown / math.log(context.rope_theta)

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
        """inv_freq [head_dim / 2] -> the same, and the factor on cos and sin."""
        return inv_freq**self.power, 1.0


@hookimpl
def moelab_rope_scalings() -> list[Component]:
    return [component("my_rope_scaling", Options, MyRopeScaling)]
