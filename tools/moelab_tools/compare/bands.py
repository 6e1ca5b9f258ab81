"""Curves of a variant: the mean over its seeds, and the band from the lowest to the highest of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.contrast import Floats
from moelab_tools.compare.runs import Run

SMOOTHING = 40  # a training curve is averaged over this part of its points


@dataclass(frozen=True)
class Band:
    """One number of a variant against what was spent; every list has P values."""

    x: list[float]
    mean: list[float]
    low: list[float]  # of the runs, at each point
    high: list[float]
    runs: int


def band(runs: Sequence[Run], tag: str, axis: str, *, most: int, smooth: bool = False) -> Band | None:
    """`tag` over the runs that have it, step by step: both what they spent and what they got are averaged.

    Steps are those of the run that has the fewest, as far as all runs reached; a run that logged others is read between
    them. `smooth`: each run's running mean over 1/SMOOTHING of its points. `most`: points. None where no run has it.
    """
    curves = [curve for run in runs if (curve := _curve(run, tag, axis, smooth)) is not None]
    if not curves:
        return None
    steps = min((step for step, _, _ in curves), key=len)
    first, last = max(step[0] for step, _, _ in curves), min(step[-1] for step, _, _ in curves)
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        return None
    spent = np.mean([np.interp(steps, step, x) for step, x, _ in curves], axis=0)
    values = np.array([np.interp(steps, step, y) for step, _, y in curves])
    thinned = thin(np.stack([spent, values.mean(0), values.min(0), values.max(0)]), most)
    x, mean, low, high = ([short(value) for value in row] for row in thinned)
    return Band(x, mean, low, high, len(curves))


def thin(rows: Floats, most: int) -> Floats:
    """rows [R, P] -> [R, at most `most`]: each column the mean of those it stands for; the first stays what it is."""
    points = rows.shape[1]
    if points <= most:
        return rows
    size = math.ceil((points - 1) / (most - 1))
    starts = np.concatenate([[0], np.arange(1, points, size)])
    counts = np.diff(np.append(starts, points))
    return np.add.reduceat(rows, starts, axis=1) / counts


def short(value: float) -> float:
    """Five digits: what a chart can show."""
    return float(f"{value:.5g}")


def _curve(run: Run, tag: str, axis: str, smooth: bool) -> tuple[Floats, Floats, Floats] | None:
    """(steps, spent, values)."""
    points = [(row["step"], row[axis], row[tag]) for row in run.rows if math.isfinite(row.get(tag, math.nan))]
    if not points:
        return None
    step, x, y = np.array(points, dtype=np.float64).T
    return step, x, _running_mean(y, max(1, len(y) // SMOOTHING)) if smooth else y


def _running_mean(values: Floats, window: int) -> Floats:
    """Mean of the last `window` values; of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
