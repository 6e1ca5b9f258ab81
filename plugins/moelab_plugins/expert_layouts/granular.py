"""Fine-grained experts cut from the dense width: granularity and expansion instead of counts."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class GranularOptions:
    granularity: int = MISSING  # an expert is intermediate_size / granularity wide
    expansion: int = 8  # all experts together are this many dense FFNs wide
    active: int = 1  # a token passes through this many dense FFNs' width

    def __post_init__(self) -> None:
        for key in ("granularity", "expansion", "active"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.active > self.expansion:
            raise ValueError(f"active {self.active} exceeds expansion {self.expansion}")


def granular(options: GranularOptions, context: LayoutContext) -> ExpertLayout | None:
    """G narrow experts in place of each wide one, at the same total and active width.

    Formula: F = intermediate_size / granularity, E = granularity * expansion, K = granularity * active. So total and
    active parameters of the experts do not depend on granularity, only the router's grow.
    Source: scaling laws for fine-grained MoE (2402.07871), DeepSeekMoE (2401.06066) 3.1.
    Use: to compare granularities fairly. Qwen2-57B-A14B is no case of it: 2560 is not 18944 / 8; use uniform.
    Cost: the router grows with E, and the matmuls of narrow experts are less efficient.
    """
    if context.intermediate_size % options.granularity:
        near = [g for g in range(1, 2 * options.granularity + 1) if context.intermediate_size % g == 0][-3:]
        raise ConfigError(
            f"granularity: {options.granularity} does not divide model.intermediate_size {context.intermediate_size}; "
            f"near it {', '.join(map(str, near))} would"
        )
    return ExpertLayout(
        options.granularity * options.expansion,
        options.granularity * options.active,
        context.intermediate_size // options.granularity,
    )


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("granular", GranularOptions, granular)]
