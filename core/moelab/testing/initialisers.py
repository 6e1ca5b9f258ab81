"""What every initialiser of routed experts must do: plan without weights, then materialise one matrix at a time.

F neurons of the dense layer, n neurons of an expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moelab import initialiser_promises as promises
from moelab.components import Component
from moelab.initialisers import ExpertInitialiser, UpcycleContext, redrawn_of
from moelab.moe.layout import ExpertLayout
from moelab.testing.report import make_options, promised, run_checks

MATRICES = ("gate", "up", "down")
HIDDEN, DENSE, WIDTH = 8, 24, 10  # WIDTH neurons an expert, unless the case says otherwise


class Dense:
    """A dense matrix [F, D] in float32 whose rows tell neurons and matrices apart."""

    dtype = "F32"

    def __init__(self, seed: int) -> None:
        self.values = np.random.default_rng(seed).normal(0, 0.05, (DENSE, HIDDEN)).astype(np.float32)

    def sums(self) -> tuple[Any, Any]:
        wide = self.values.astype(np.float64)
        return wide.sum(1), (wide**2).sum(1)

    def float32(self, rows: Any) -> Any:
        return self.values[rows]


@dataclass
class InitialiserCase:
    """One initialiser of routed experts under test."""

    component: Component[UpcycleContext, ExpertInitialiser]
    options: Any = None
    width: int = WIDTH
    num_experts: int = 6
    num_sources: int = 1  # dense checkpoints that are mixed; the kit gives each the same values
    dense: dict[str, Dense] = field(default_factory=lambda: {m: Dense(i) for i, m in enumerate(MATRICES)})

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self, seed: int = 0, layer_id: int = 1) -> ExpertInitialiser:
        """A fresh initialiser, prepared where it wants to see weights first."""
        layout = ExpertLayout(self.num_experts, 2, self.width)
        context = UpcycleContext(HIDDEN, DENSE, layer_id, 4, layout, 0, True, 0.02, seed, self.num_sources)
        built = self.component.build(self.options, context)
        promised(promises.built("experts", built), built)
        prepare = getattr(built, "prepare", None)
        if prepare is not None:
            prepare(lambda matrix: self.dense[matrix])
        return built

    def matrices(self, initialiser: ExpertInitialiser, expert: int) -> dict[str, Any]:
        """{matrix: [n, D] float32} of one expert."""
        plan = initialiser.plan(expert)
        return {
            matrix: np.asarray(initialiser.materialise(plan, expert, matrix, self.dense[matrix]), np.float32)
            for matrix in MATRICES
        }


def plans_every_neuron(case: InitialiserCase) -> None:
    """A source for each of n neurons, or none; which are redrawn is said for each matrix."""
    initialiser = case.build()
    for expert in range(case.num_experts):
        plan = initialiser.plan(expert)
        promised(promises.planned(plan, case.width, DENSE, case.num_sources), initialiser.plan)


def fills_every_matrix(case: InitialiserCase) -> None:
    """[n, D], finite."""
    initialiser = case.build()
    plan = initialiser.plan(0)
    for matrix in MATRICES:
        values = initialiser.materialise(plan, 0, matrix, case.dense[matrix])
        promised(promises.made(values, (case.width, HIDDEN), np.float32, finite=True), initialiser.materialise)


def any_order_gives_the_same(case: InitialiserCase) -> None:
    """Experts are made in any order, by any process: equal bits."""
    forwards, backwards = case.build(), case.build()
    first = [case.matrices(forwards, expert) for expert in range(case.num_experts)]
    second = [case.matrices(backwards, expert) for expert in reversed(range(case.num_experts))][::-1]
    for expert, (one, two) in enumerate(zip(first, second, strict=True)):
        for matrix in MATRICES:
            same = np.array_equal(one[matrix], two[matrix])
            assert same, f"expert {expert}'s {matrix} depends on the order of asking"


def the_seed_decides(case: InitialiserCase) -> None:
    """Where anything is drawn, another seed draws something else."""
    initialiser = case.build()
    plan = initialiser.plan(0)
    if not any(plan.redrawn[matrix].any() for matrix in MATRICES):
        return
    first, other = case.matrices(initialiser, 0), case.matrices(case.build(seed=1), 0)
    assert any(not np.array_equal(first[m], other[m]) for m in MATRICES), "another seed gives the same experts"


def redraws_what_it_says(case: InitialiserCase) -> None:
    """Where `redrawn` is offered: those rows of `materialise`, and the others are the planned dense rows."""
    initialiser = case.build()
    redrawn = redrawn_of(initialiser)
    if redrawn is None:
        return
    for expert in range(case.num_experts):
        plan = initialiser.plan(expert)
        for matrix in MATRICES:
            dense, changed = case.dense[matrix], plan.changed(matrix)
            new = redrawn(plan, expert, matrix, dense)
            if new is None:
                continue
            promised(promises.made(new, (int(changed.sum()), HIDDEN), np.float32, finite=True), redrawn)
            rows = initialiser.materialise(plan, expert, matrix, dense)
            assert np.array_equal(rows[changed], new), f"expert {expert}'s {matrix}: other rows than materialise has"
            same = np.array_equal(rows[~changed], dense.values[plan.source[~changed]])
            assert same, f"expert {expert}'s {matrix}: offers redrawn, and has changed other rows too"


INITIALISER_CHECKS: tuple[Callable[[InitialiserCase], None], ...] = (
    plans_every_neuron,
    fills_every_matrix,
    any_order_gives_the_same,
    the_seed_decides,
    redraws_what_it_says,
)


def check_initialiser(
    component: Component[UpcycleContext, ExpertInitialiser],
    options: Any = None,
    *,
    width: int = WIDTH,
    num_experts: int = 6,
    num_sources: int = 1,
) -> None:
    """Run every check of INITIALISER_CHECKS; raises ConformanceError naming those that fail."""
    case = InitialiserCase(component, options, width, num_experts, num_sources)
    run_checks("expert initialiser", component, case, INITIALISER_CHECKS)
