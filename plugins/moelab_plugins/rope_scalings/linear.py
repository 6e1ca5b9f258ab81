"""Position interpolation: every frequency divided by one factor."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from omegaconf import MISSING

from moelab import Component, component, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.config.rope_scaling import RopeContext
    from moelab.nn.rope import RopeScaling


@dataclass
class LinearOptions:
    factor: float = MISSING  # how many times the trained length

    def __post_init__(self) -> None:
        if not 1 <= self.factor < inf:
            raise ValueError(f"factor must be at least 1, not {self.factor}")


class Linear:
    """Position interpolation: positions squeezed into the trained length.

    Formula: theta_k' = theta_k / f.
    Source: Chen et al. (2306.15595) 2.3, eq. 4; transformers 5.23, modeling_rope_utils.py.
    Use: before a fine-tuning at the longer length; without one near positions blur.
    Cost: none at run time; changes short texts too.
    """

    length_matters = False

    def __init__(self, options: LinearOptions, context: RopeContext) -> None:
        self.factor = options.factor
        self.reach = options.factor * context.max_position_embeddings

    def __call__(self, inv_freq: Tensor, length: int) -> tuple[Tensor, float]:
        return inv_freq / self.factor, 1.0


@hookimpl
def moelab_rope_scalings() -> list[Component[RopeContext, RopeScaling | None]]:
    return [component("linear", LinearOptions, Linear)]
