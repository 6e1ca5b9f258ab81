"""Plain rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab import Component, component, hookimpl

if TYPE_CHECKING:
    from moelab.config.rope_scaling import RopeContext
    from moelab.nn.rope import RopeScaling


@dataclass
class NoScalingOptions:
    """None."""


def no_scaling(options: NoScalingOptions, context: RopeContext) -> RopeScaling | None:
    """Plain rotary embedding: the angle of a position is the position times the frequency.

    Formula: theta_k = b^(-2k/d).
    Source: RoFormer (2104.09864) 3.2.2; Qwen2 (2407.10671) 3.2 with b = 1e6 for its long stage, 1e4 before.
    Use: the baseline; what every model is trained with.
    Cost: none. Beyond the trained length the loss rises steeply.
    """
    return None


@hookimpl
def moelab_rope_scalings() -> list[Component[RopeContext, RopeScaling | None]]:
    return [component("none", NoScalingOptions, no_scaling)]
