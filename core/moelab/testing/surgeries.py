"""What every surgery must do: refuse or plan a layer that can be, the same one each time, out of what it asked for.

E experts of F neurons, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelab.components import Component
from moelab.errors import ConfigError
from moelab.moe.layout import ExpertLayout
from moelab.moe.surgery import (
    MEASURES,
    Evidence,
    ExpertRows,
    LayerPlan,
    Scores,
    Surgery,
    SurgeryContext,
    expert_rows_of,
    plan_fault,
)
from moelab.plugin_faults import article
from moelab.surgery.tensors import VALUES, LayerSurgery
from moelab.tensor_parts import Stored
from moelab.testing.report import make_options, promised, run_checks

HIDDEN, TOKENS = 6, 100


@dataclass
class SurgeryCase:
    """One surgery under test, on a layer of random experts."""

    component: Component[SurgeryContext, Surgery]
    options: Any = None
    layout: ExpertLayout = field(default_factory=lambda: ExpertLayout(8, 2, 12))
    rows: ExpertRows = field(default_factory=lambda: ExpertRows(("weight",), "share"))
    seed: int = 0

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        stream, layout = np.random.default_rng(self.seed), self.layout
        experts, width = layout.num_experts, layout.moe_intermediate_size
        shapes = {
            "experts.gate_up": (experts, 2 * width, HIDDEN), "experts.down": (experts, width, HIDDEN),
            "router.weight": (experts, HIDDEN),
        }  # fmt: skip
        self.tensors = {name: torch.from_numpy(stream.normal(size=shape)).float() for name, shape in shapes.items()}
        together = stream.integers(1, 20, (experts, experts)).astype(np.float64)
        together += together.T + 40 * np.eye(experts)
        load = np.diagonal(together).copy()
        load[0], together[0], together[:, 0] = 0, 0, 0  # one is dead
        self.scores = Scores(
            TOKENS, load, together, stream.random(experts), stream.normal(size=experts),
            stream.normal(size=(experts, HIDDEN)),
        )  # fmt: skip

    @property
    def context(self) -> SurgeryContext:
        return SurgeryContext(1, 4, HIDDEN, self.layout, self.rows, self.seed)

    def build(self) -> Surgery:
        return self.component.build(self.options, self.context)

    def plan(self) -> LayerPlan:
        """Of a fresh surgery, which sees of the scores what it said it needs."""
        surgery = self.build()
        measured = {name: getattr(self.scores, name) for name in surgery.needs}
        return surgery.plan(Evidence(self.tensors.__getitem__, Scores(TOKENS, **measured)))


def says_what_it_needs(case: SurgeryCase) -> None:
    """`needs` names measures that there are, and `plan` can be called."""
    surgery = case.build()
    assert isinstance(surgery, Surgery), f"built {article(surgery)}; it must have `needs` and `plan(evidence)`"
    assert isinstance(surgery.needs, frozenset), f"`needs` is {article(surgery.needs)}; it must be a frozenset"
    unknown = surgery.needs - set(MEASURES)
    assert not unknown, f"`needs` names {sorted(unknown)}; there are {', '.join(MEASURES)}"


def plans_a_layer_that_can_be(case: SurgeryCase) -> None:
    """Sources, shares, neurons and K are in range, with nothing but what it said it needs."""
    promised(plan_fault(case.plan(), case.context), case.component.build)


def says_why(case: SurgeryCase) -> None:
    """A plan says whether the function stays, and why or why not."""
    plan = case.plan()
    assert isinstance(plan.exact, bool), f"`exact` is {article(plan.exact)}; it must be a bool"
    assert plan.because.strip(), "`because` is empty: why does the function stay, or why not?"


def plans_the_same_again(case: SurgeryCase) -> None:
    """A plan follows from the layer, the scores and the seed alone."""
    one, other = case.plan(), case.plan()
    same = len(one.experts) == len(other.experts) and all(
        (a.sources, a.shares) == (b.sources, b.shares) and _same(a.neurons, b.neurons)
        for a, b in zip(one.experts, other.experts, strict=True)
    )
    assert same, "another call gives another plan: draw from a stream of `context.seed`"


def keeps_the_function_where_it_says_so(case: SurgeryCase) -> None:
    """A layer that is `exact` gives the same output, by a softmax that is normalised over the K best, in float64."""
    plan = case.plan()
    if not plan.exact:
        return
    surgery = LayerSurgery(1, plan, case.rows, case.layout.num_experts, case.layout.moe_intermediate_size, case.seed)
    made = {name: surgery.make(name, VALUES, Held(tensor)).double() for name, tensor in case.tensors.items()}
    x = torch.randn(32, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(case.seed))
    before = _layer({name: tensor.double() for name, tensor in case.tensors.items()}, x, case.layout)
    gap = float((_layer(made, x, plan.layout) - before).abs().max() / before.abs().max())
    assert gap < 1e-6, f"says `exact`, and the output of the layer is another one by {gap:.1e} of its largest"


class Held(Stored):
    """A tensor of memory in place of one on disk."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tuple(tensor.shape), ())
        object.__setattr__(self, "tensor", tensor)

    def read(self) -> Tensor:
        return torch.as_tensor(self.__dict__["tensor"])


def _layer(tensors: dict[str, Tensor], x: Tensor, layout: ExpertLayout) -> Tensor:
    """A loop over the K best of a softmax, normalised: x [T, D] -> [T, D]."""
    weight, expert = (x @ tensors["router.weight"].T).softmax(-1).topk(layout.num_experts_per_tok, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for share, chosen in zip(weight[token], expert[token].tolist(), strict=True):
            gate, up = (tensors["experts.gate_up"][chosen] @ x[token]).chunk(2)
            y[token] += share * ((torch.nn.functional.silu(gate) * up) @ tensors["experts.down"][chosen])
    return y


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


SURGERY_CHECKS: tuple[Callable[[SurgeryCase], None], ...] = (
    says_what_it_needs,
    plans_a_layer_that_can_be,
    says_why,
    plans_the_same_again,
    keeps_the_function_where_it_says_so,
)


def check_surgery(component: Component[SurgeryContext, Surgery], options: Any = None) -> None:
    """Run every check of SURGERY_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("surgery", component, SurgeryCase(component, options), SURGERY_CHECKS)


def rows_fault(small: Any, large: Any, more: int) -> str | None:
    """What is wrong with a router's `expert_rows`, seen on it and on one of `more` experts more; None: nothing."""
    before, after = small.state_dict(), large.state_dict()
    rows = expert_rows_of(small, list(before))
    if isinstance(rows, str) and isinstance(getattr(small, "expert_rows", None), ExpertRows):
        return rows
    if isinstance(rows, str):
        return None if rows.strip() else "`expert_rows` is an empty text; say why its experts can't be cut"
    for name, tensor in before.items():
        grown = [*tensor.shape[:1], *tensor.shape[1:]]
        if name in rows.tensors:
            grown = [tensor.shape[0] + more, *tensor.shape[1:]]
        if list(after[name].shape) != grown:
            said = "has a row for each expert" if name in rows.tensors else "does not depend on the number of experts"
            return (
                f"`expert_rows` says that '{name}' {said}, and with {more} experts more it is "
                f"{list(after[name].shape)}, not {grown}"
            )
    return None


def refuses(case: SurgeryCase) -> str | None:
    """What it says where it can't be built; None where it can."""
    try:
        case.build()
    except ConfigError as error:
        return str(error)
    return None
