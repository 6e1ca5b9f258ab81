"""Which layout costs what another model does: iso-parameter and iso-FLOP comparisons without arithmetic by hand.

Active parameters and FLOPs are those that the routers declare; what a run serves is known when it has run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.config.scalars import settle
from moelab.errors import ConfigError, near
from moelab.nn.count import count_parameters, flops_per_token
from moelab.registry import Registry

MEASURES = ("total", "active", "flops")


LAYOUT, DENSE_WIDTH = "model.moe.layout", "model.intermediate_size"


@dataclass(frozen=True)
class Match:
    """The value of a layout's option, or of a dense model's width, that comes nearest to the baseline."""

    option: str
    value: int
    measure: str
    wanted: float
    found: float
    key: str = ""  # of the config

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
    if config.moe is None:
        raise ConfigError("model.moe: is null, so there is no layout to match")

    def at(value: int) -> float:
        changed = copy.deepcopy(config)
        assert changed.moe is not None
        changed.moe.layout = {**changed.moe.layout, option: value}
        return measure_model(changed, measure, sequence_length, registry)

    start = int(settle(config.moe.layout.get(option)) or multiple_of)
    wanted = measure_model(baseline, measure, sequence_length, registry)
    value = _nearest(at, wanted, start, multiple_of, (f"{LAYOUT}.{option}", measure))
    return Match(option, value, measure, wanted, at(value), f"{LAYOUT}.{option}")


def match_dense(
    config: ModelConfig,
    baseline: ModelConfig,
    registry: Registry,
    *,
    measure: str = "active",
    multiple_of: int = 1,
    sequence_length: int = 1024,
) -> Match:
    """The same for a dense model, by the width of its FFN."""

    def at(value: int) -> float:
        changed = copy.deepcopy(config)
        changed.intermediate_size = value
        return measure_model(changed, measure, sequence_length, registry)

    wanted = measure_model(baseline, measure, sequence_length, registry)
    value = _nearest(at, wanted, config.intermediate_size, multiple_of, (DENSE_WIDTH, measure))
    return Match("intermediate_size", value, measure, wanted, at(value), DENSE_WIDTH)


def _nearest(at: Callable[[int], float], wanted: float, start: int, step: int, words: tuple[str, str]) -> int:
    """The multiple of `step` at which `at`, linear, is nearest to `wanted`; `words`: the key and the measure."""
    key, measure = words
    low = -(-start // step) * step
    slope = (at(low + step) - at(low)) / step
    if slope <= 0:
        raise ConfigError(f"{key}: has no influence on '{measure}'; vary another option")
    exact = low + (wanted - at(low)) / slope
    if exact < step / 2:
        raise ConfigError(
            f"{key}: even {step} costs {at(step):.4g}, and the baseline's {measure} is {wanted:.4g}; make another part "
            "smaller"
        )
    return max(round(exact / step), 1) * step
