"""The shape of one layer's experts: how many, how wide, how many per token."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from moelab.plugin_faults import article

SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class LayoutContext:
    """What an expert layout may depend on; one for each decoder layer."""

    hidden_size: int
    intermediate_size: int  # width of the dense FFN
    layer_id: int  # 0 .. num_hidden_layers - 1
    num_hidden_layers: int


@dataclass(frozen=True)
class ExpertLayout:
    """One MoE layer. A layout plugin returns None instead for a layer that stays dense."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of the widest expert
    expert_widths: tuple[int, ...] | None = None  # of each expert; None: all moe_intermediate_size

    @property
    def total_width(self) -> int:
        """FFN neurons of all routed experts together."""
        return sum(self.expert_widths) if self.expert_widths else self.num_experts * self.moe_intermediate_size

    @property
    def active_width(self) -> int:
        """FFN neurons that one token passes through in the routed experts, at balance where their widths differ."""
        return self.num_experts_per_tok * self.total_width // self.num_experts


def layout_fault(layout: object) -> str | None:
    """What is wrong with what a layout plugin returned, for `PluginPart.fault`; None: nothing, but for its sizes."""
    if layout is None:
        return None
    if not isinstance(layout, ExpertLayout):
        return f"returned {article(layout)}; it must return a moelab.ExpertLayout, or None for a dense layer"
    for key in SIZES:
        if not _is_whole(getattr(layout, key)):
            return f"returned {key} {getattr(layout, key)!r}; it must be a whole number"
    widths = layout.expert_widths
    if widths is None:
        return None
    if not isinstance(widths, tuple) or not widths or not all(map(_is_whole, widths)):
        return f"returned expert_widths {widths!r}; they must be a tuple of whole numbers"
    if len(widths) != layout.num_experts or min(widths) < 1 or max(widths) != layout.moe_intermediate_size:
        return (
            f"returned expert_widths {widths!r}; there must be one for each of {layout.num_experts} experts, and the "
            f"widest must be moe_intermediate_size {layout.moe_intermediate_size}"
        )
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
