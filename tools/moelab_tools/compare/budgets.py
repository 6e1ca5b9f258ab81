"""The loss of each run at the same number of tokens, and at the same number of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.runs import Run

WINDOW = 0.1  # of the budget: the stretch before it over which a training loss is averaged
TOLERANCE = 1e-6  # relative: two runs of the same number of steps have the same budget


@dataclass(frozen=True)
class Budget:
    """What the runs had reached when each had spent `amount`."""

    axis: str  # "tokens" or "flops"
    amount: float
    source: str  # a sentence that says which curve was read, and how
    losses: dict[str, float]  # by run name
    cut_short: tuple[str, ...]  # runs that went on, so that their learning rate had not decayed yet


def equal_budgets(runs: Sequence[Run]) -> list[Budget]:
    """At the smallest common tokens and the smallest common FLOPs; none for a single run."""
    if len(runs) < 2:
        return []
    budgets = [_budget(runs, axis) for axis in ("tokens", "flops")]
    return [budget for budget in budgets if budget is not None]


def _budget(runs: Sequence[Run], axis: str) -> Budget | None:
    """The evaluation curve where it brackets the amount in every run, else everywhere the training loss."""
    ends = {run.name: run.amount(axis) for run in runs}
    amount = min(ends.values())
    if amount <= 0:
        return None
    cut_short = tuple(name for name, end in ends.items() if end > amount * (1 + TOLERANCE))
    held_out = {run.name: _interpolate(*run.curve("eval/loss", axis), amount) for run in runs}
    losses = {name: loss for name, loss in held_out.items() if loss is not None}
    source = "held-out loss (eval/loss), interpolated linearly between evaluations"
    if len(losses) < len(runs):
        losses = {}
        for run in runs:
            loss = _average_before(*_training_curve(run, axis), amount)
            if loss is not None:
                losses[run.name] = loss
        source = (
            f"training loss (train/lm_loss), averaged over the {WINDOW:.0%} before this point, because not every run "
            "was evaluated on both sides of it (set evaluation.every)"
        )
    return Budget(axis, amount, source, losses, cut_short) if losses else None


def _training_curve(run: Run, axis: str) -> tuple[list[float], list[float]]:
    """Without the balance losses where they are logged apart."""
    curve = run.curve("train/lm_loss", axis)
    return curve if curve[0] else run.curve("train/loss", axis)


def _interpolate(x: list[float], y: list[float], amount: float) -> float | None:
    if not x or x[0] > amount * (1 + TOLERANCE) or x[-1] < amount * (1 - TOLERANCE):
        return None
    return float(np.interp(amount, x, y))


def _average_before(x: list[float], y: list[float], amount: float) -> float | None:
    """Mean of y over (1 - WINDOW) * amount .. amount."""
    inside = [value for at, value in zip(x, y, strict=True) if (1 - WINDOW) * amount < at <= amount * (1 + TOLERANCE)]
    return float(np.mean(inside)) if inside else None
