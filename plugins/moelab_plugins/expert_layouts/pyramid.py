"""More experts towards the top."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from moelab import Component, ConfigError, ExpertLayout, LayoutContext, component, hookimpl


@dataclass
class PyramidOptions:
    first_num_experts: int = MISSING  # of layer 0
    last_num_experts: int = MISSING  # of the last layer
    num_experts_per_tok: int = MISSING
    moe_intermediate_size: int = MISSING
    multiple_of: int = 1  # counts between are rounded to a multiple, for groups and expert parallelism

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, not {self.multiple_of}")


def pyramid(options: PyramidOptions, context: LayoutContext) -> ExpertLayout | None:
    """Expert counts that grow (or shrink) linearly from the first layer to the last.

    Formula: E_l = first + (last - first) l / (L - 1), rounded to multiple_of.
    Source: PR-MoE (DeepSpeed-MoE, 2201.05596) 4.1, which doubles the experts of the last layers.
    Use: upper layers profit more from experts than lower ones, the paper finds.
    Cost: the mean of first and last.
    """
    for key in ("first_num_experts", "last_num_experts"):
        if getattr(options, key) % options.multiple_of:
            raise ConfigError(f"{key}: {getattr(options, key)} is no multiple of multiple_of {options.multiple_of}")
    share = context.layer_id / max(context.num_hidden_layers - 1, 1)
    exact = options.first_num_experts + (options.last_num_experts - options.first_num_experts) * share
    experts = int(exact / options.multiple_of + 0.5) * options.multiple_of
    return ExpertLayout(max(experts, options.multiple_of), options.num_experts_per_tok, options.moe_intermediate_size)


@hookimpl
def moelab_expert_layouts() -> list[Component[LayoutContext, ExpertLayout | None]]:
    return [component("pyramid", PyramidOptions, pyramid)]
