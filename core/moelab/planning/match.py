"""Which layout costs what another model does: iso-parameter and iso-FLOP comparisons without arithmetic by hand.

Active parameters and FLOPs are those that the routers declare; what a run serves is known when it has run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.config.scalars import settle
from moelab.errors import ConfigError, near
from moelab.nn.count import count_parameters, flops_per_token
from moelab.registry import Registry

MEASURES = ("total", "active", "flops")


@dataclass(frozen=True)
class Match:
    """The value of a layout's option that comes nearest to the baseline."""

    option: str
    value: int
    measure: str
    wanted: float
    found: float

    @property
    def error(self) -> float:
        """Relative distance from the baseline."""
        return self.found / self.wanted - 1


def measure_model(config: ModelConfig, measure: str, sequence_length: int, registry: Registry) -> float:
    """Total parameters, declared active parameters, or declared training FLOPs per token; no memory for weights."""
    if measure not in MEASURES:
        raise ConfigError(f"measure: no '{measure}'{near(measure, MEASURES)} Known: {', '.join(MEASURES)}")
    model = build_model(config, registry, device="meta", seed=None)
    if measure == "flops":
        return flops_per_token(model, sequence_length)
    counted = count_parameters(model)
    return float(counted.total if measure == "total" else counted.active)


def match_layout(
    config: ModelConfig,
    baseline: ModelConfig,
    registry: Registry,
    *,
    measure: str = "active",
    option: str = "moe_intermediate_size",
    multiple_of: int = 1,
    sequence_length: int = 1024,
) -> Match:
    """The multiple of `multiple_of` for which `config` measures as near to `baseline` as it can.

    `option` is one of the layout's numbers in which the measure is linear: moe_intermediate_size, num_experts (of
    total), num_experts_per_tok (of active and flops, for routers that declare by it).
    Raises ConfigError when it has no influence or can't get there.
    """
    wanted = measure_model(baseline, measure, sequence_length, registry)
    if config.moe is None:
        raise ConfigError("model.moe: is null, so there is no layout to match")

    def at(value: int) -> float:
        changed = copy.deepcopy(config)
        assert changed.moe is not None
        changed.moe.layout = {**changed.moe.layout, option: value}
        return measure_model(changed, measure, sequence_length, registry)

    start = int(settle(config.moe.layout.get(option)) or multiple_of)
    low = -(-start // multiple_of) * multiple_of
    slope = (at(low + multiple_of) - at(low)) / multiple_of
    if slope <= 0:
        raise ConfigError(f"model.moe.layout.{option}: has no influence on '{measure}'; vary another option")
    exact = low + (wanted - at(low)) / slope
    value = max(round(exact / multiple_of), 1) * multiple_of
    if exact < multiple_of / 2:
        raise ConfigError(
            f"model.moe.layout.{option}: even {multiple_of} costs {at(multiple_of):.4g}, and the baseline's {measure} "
            f"is {wanted:.4g}; make another part smaller"
        )
    return Match(option, value, measure, wanted, at(value))
