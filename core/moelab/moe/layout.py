"""The shape of one layer's experts: how many, how wide, how many per token."""

from __future__ import annotations

from dataclasses import dataclass


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
