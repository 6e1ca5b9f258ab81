"""The loss of each run at equal tokens, at equal FLOPs served and after equal seconds, in the comparison's unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.measure import Measure
from moelab_tools.compare.runs import Run

AXES = ("tokens", "flops", "seconds")
TOLERANCE = 1e-6  # relative: two runs of the same number of steps have the same budget
CLOSE = 0.01  # relative: a run read so near its end had brought its learning rate down; steps can't match FLOPs closer
FAR = 0.1  # of the budget: an evaluation further off makes an interpolated loss a rough one
OFF = 0.02  # relative: from which on a run's FLOPs are told to differ from what its routers declared


@dataclass(frozen=True)
class Budget:
    """What the runs had reached when each had spent `amount`. A run is in `losses` or in `missing`."""

    axis: str  # of AXES
    amount: float
    unit: str  # of the losses: the comparison's measure, whatever the axis
    spent_by: str  # the run that spent just this in all
    losses: dict[str, float]  # held-out, by run name
    between: dict[str, tuple[float, float]]  # run -> the two evaluations that its loss is interpolated between
    missing: dict[str, str]  # run -> why it has no loss here
    cut_short: tuple[str, ...]  # runs that went on, so that their learning rate had not decayed yet

    @property
    def rough(self) -> tuple[str, ...]:
        """Runs whose nearest evaluation is more than FAR of the budget away."""
        gap = {run: min(self.amount - low, high - self.amount) for run, (low, high) in self.between.items()}
        return tuple(run for run, distance in gap.items() if distance > FAR * self.amount)


def equal_budgets(runs: Sequence[Run], measure: Measure) -> list[Budget]:
    """At the smallest common tokens, FLOPs and seconds, among the runs that counted them; none for a single run."""
    if len(runs) < 2:
        return []
    return [budget for axis in AXES if (budget := _budget(runs, axis, measure)) is not None]


def flops_warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader of the FLOPs must know: runs that did not count them, and those that served other than declared."""
    told = [
        f"{run.name} was written before runs counted what their experts served: its FLOPs are not known, so it is left "
        "out at equal FLOPs; train it again"
        for run in runs
        if not run.counts_flops
    ]
    for run in runs:
        declared = run.summary.get("flops_declared")
        if run.counts_flops and declared and abs(run.amount("flops") / declared - 1) > OFF:
            told.append(
                f"{run.name} served {run.amount('flops') / declared:.2f} times the FLOPs that its routers declare; "
                "`explain`, `plan` and --match go by the declared ones, this comparison by the served ones"
            )
    return told


def _budget(runs: Sequence[Run], axis: str, measure: Measure) -> Budget | None:
    """The evaluation curve where it brackets the amount; None where no run counted it."""
    counted = [run for run in runs if axis != "flops" or run.counts_flops]
    ends = {run.name: run.amount(axis) for run in counted}
    cheapest = min(ends, key=lambda name: ends[name], default=None)
    if cheapest is None or ends[cheapest] <= 0:
        return None
    amount = ends[cheapest]
    losses: dict[str, float] = {}
    between: dict[str, tuple[float, float]] = {}
    missing = {run.name: "what the experts served was not counted" for run in runs if run not in counted}
    for run in counted:
        x, y = _trained(*run.curve(measure.tag, axis))
        if not x or x[-1] < amount * (1 - TOLERANCE):
            missing[run.name] = f"no {measure.tag} at or after this point"
        elif x[0] > amount * (1 + TOLERANCE):
            missing[run.name] = "no evaluation before this point (set evaluation.every)"
        else:
            losses[run.name] = float(np.interp(amount, x, y))
            low = max(at for at in x if at <= amount * (1 + TOLERANCE))
            high = min(at for at in x if at >= amount * (1 - TOLERANCE))
            if high > low:
                between[run.name] = (low, high)
    cut_short = tuple(name for name, end in ends.items() if end > amount * (1 + CLOSE))
    return Budget(axis, amount, measure.name, cheapest, losses, between, missing, cut_short)


def _trained(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Without the evaluation before the first step: from there to the next one no straight line leads."""
    points = [(spent, loss) for spent, loss in zip(x, y, strict=True) if spent > 0]
    return [spent for spent, _ in points], [loss for _, loss in points]
