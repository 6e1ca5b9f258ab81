"""One sparse layer in every n."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class EveryNOptions:
    num_experts: int = MISSING
    num_experts_per_tok: int = MISSING
    moe_intermediate_size: int = MISSING
    every: int = 2  # one layer in `every` is sparse
    offset: int = 1  # the first of them

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.offset < self.every:
            raise ValueError(
                f"every must be at least 1 and offset in 0 .. every - 1, not {self.every} and {self.offset}"
            )


def every_n(options: EveryNOptions, context: LayoutContext) -> ExpertLayout | None:
    """Layers offset, offset + every, ... sparse, the others dense.

    Source: GShard (2006.16668) 2.1 and Switch (2101.03961) 2: every other feed-forward layer.
    Use: fewer experts at the same depth; mixture_of_depths, which the paper puts into every other layer.
    Cost: 1 / every of uniform's experts.
    """
    if options.offset >= context.num_hidden_layers:
        raise ConfigError(f"offset: {options.offset} leaves none of {context.num_hidden_layers} layers with experts")
    if context.layer_id % options.every != options.offset:
        return None
    return ExpertLayout(options.num_experts, options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("every_n", EveryNOptions, every_n)]
