"""How many times the tokens, FLOPs or seconds the baseline needs for the same loss, with its interval.

Read from the held-out curves of each pair of runs, at the higher of their two last losses, which both have reached:
nothing is extrapolated. More than 1 means that the variant is the cheaper one. The run that ended lower is read before
its end, where its learning rate had not come down, so it seems dearer than a run of that length would be: a
multiplier favours the run that ended higher, and is resolved only against that.

The interval is one of logarithms: t over pairs, and the error of the held-out text divided by the slope of the curves
(delta method), added as squares like those of the losses (`contrast`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.contrast import LEVEL, Contrast, Floats
from moelab_tools.compare.pairing import LEAST_PAIRS


@dataclass(frozen=True)
class Curve:
    """Held-out loss against what was spent, of one run."""

    spent: Floats  # [P], rising
    loss: Floats  # [P]

    @classmethod
    def of(cls, spent: Sequence[float], loss: Sequence[float]) -> Curve:
        """Of points in the order of the run; those before anything was spent have no logarithm and are left out."""
        points = [(x, y) for x, y in zip(spent, loss, strict=True) if x > 0 and math.isfinite(y)]
        return cls(np.array([x for x, _ in points]), np.array([y for _, y in points]))

    def reached(self, loss: float) -> tuple[float, float] | None:
        """(log of what was spent when `loss` was first reached, slope of the loss against it there).

        Linear in the logarithm between evaluations. None when the first evaluation was below it, or none was.
        """
        below = np.flatnonzero(self.loss <= loss)
        if not len(below) or below[0] == 0:
            return None
        after = int(below[0])
        (x0, x1), (y0, y1) = np.log(self.spent[after - 1 : after + 1]), self.loss[after - 1 : after + 1]
        slope = float((y1 - y0) / (x1 - x0))
        return float(x0 + (loss - y0) / slope), slope


@dataclass(frozen=True)
class Multiplier:
    """Of one variant against the baseline, on one axis."""

    axis: str  # "tokens", "flops" or "seconds"
    factor: float
    low: float | None  # None where there is no error to take it from
    high: float | None
    pairs: int
    covers: str  # as in a verdict
    resolved: bool  # the interval leaves 1 out in favour of the run that ended lower; pairs enough for a word


def multiplier(
    axis: str, pairs: Sequence[tuple[Curve, Curve]], text_error: float, text_freedom: float, level: float = LEVEL
) -> Multiplier | None:
    """pairs of (variant, baseline); text_error of their difference in the curves' unit, 0 where it is not known.

    None where some pair has no loss that both were seen to reach: set evaluation.every.
    """
    logs, slopes, ends = [], [], []
    for variant, baseline in pairs:
        if not len(variant.loss) or not len(baseline.loss):
            return None
        target = max(float(variant.loss[-1]), float(baseline.loss[-1]))
        mine, theirs = variant.reached(target), baseline.reached(target)
        if mine is None or theirs is None:
            return None
        logs.append(theirs[0] - mine[0])
        ends.append(float(baseline.loss[-1] - variant.loss[-1]))
        slopes.append(min(abs(mine[1]), abs(theirs[1])))
    if not logs:
        return None
    count = len(logs)
    mean = float(np.mean(logs))
    seed_error = float(np.std(logs, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    error = Contrast(mean, seed_error, max(count - 1.0, 1.0), text_error / float(np.mean(slopes)), text_freedom)
    half = float(error.half(level))
    known = half > 0
    return Multiplier(
        axis=axis,
        factor=math.exp(mean),
        low=math.exp(mean - half) if known else None,
        high=math.exp(mean + half) if known else None,
        pairs=count,
        covers="training seeds and held-out text" if seed_error else "held-out text" if known else "nothing",
        resolved=count >= LEAST_PAIRS and seed_error > 0 and abs(mean) > half and mean * float(np.mean(ends)) > 0,
    )
