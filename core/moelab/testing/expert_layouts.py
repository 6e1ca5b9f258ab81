"""What every expert layout must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moelab.components import Component
from moelab.moe.layout import SIZES, ExpertLayout, LayoutContext, layout_fault
from moelab.testing.report import make_options, promised, run_checks


@dataclass
class ExpertLayoutCase:
    """One layout under test, for a model of some layers."""

    component: Component[LayoutContext, ExpertLayout | None]
    options: Any = None
    hidden_size: int = 16
    intermediate_size: int = 32
    num_hidden_layers: int = 4

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def layers(self, order: list[int] | None = None) -> dict[int, ExpertLayout | None]:
        """{layer: what the layout says of it}, asked in `order`."""
        asked = order if order is not None else list(range(self.num_hidden_layers))
        sizes = (self.hidden_size, self.intermediate_size)
        return {
            layer: self.component.build(self.options, LayoutContext(*sizes, layer, self.num_hidden_layers))
            for layer in asked
        }


def gives_layouts_that_can_be_built(case: ExpertLayoutCase) -> None:
    """Counts and widths are positive integers, and no token has more experts than there are."""
    for layer, layout in case.layers().items():
        if layout is None:
            continue
        promised(layout_fault(replace(layout, expert_widths=None) if isinstance(layout, ExpertLayout) else layout))
        for key in SIZES:
            value = getattr(layout, key)
            assert value >= 1, f"layer {layer}: {key} is {value}"
        assert layout.num_experts_per_tok <= layout.num_experts, f"layer {layer}: more experts per token than experts"


def widths_agree_with_their_number(case: ExpertLayoutCase) -> None:
    """`expert_widths`, where given, has one width an expert, the widest being moe_intermediate_size."""
    for layout in case.layers().values():
        promised(layout_fault(layout))


def some_layer_is_sparse(case: ExpertLayoutCase) -> None:
    """A layout without experts is a dense model by another name."""
    assert any(layout is not None for layout in case.layers().values()), "no layer has experts"


def does_not_depend_on_the_order_of_asking(case: ExpertLayoutCase) -> None:
    """Layers are asked for in any order, and more than once."""
    backwards = list(reversed(range(case.num_hidden_layers)))
    assert case.layers(backwards) == case.layers() == case.layers(), "another order of asking gives another layout"


EXPERT_LAYOUT_CHECKS: tuple[Callable[[ExpertLayoutCase], None], ...] = (
    gives_layouts_that_can_be_built,
    widths_agree_with_their_number,
    some_layer_is_sparse,
    does_not_depend_on_the_order_of_asking,
)


def check_expert_layout(component: Component[LayoutContext, ExpertLayout | None], options: Any = None) -> None:
    """Run every check of EXPERT_LAYOUT_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("expert layout", component, ExpertLayoutCase(component, options), EXPERT_LAYOUT_CHECKS)
