"""What a loss costs: each variant's held-out loss against what it spent and what it is, with the frontier of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moelab_tools.compare.bands import short
from moelab_tools.compare.charts import Cast, Chart, Section
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.runs import Run
from moelab_tools.compare.variants import score

ALIKE = 1e-6  # relative: costs that differ by less are one place, and no chart
LOGARITHMIC = 8.0  # the largest cost by the smallest, from which on the axis counts in powers
MEMORY = "perf/memory_gb"  # the peak so far
TITLE = "What a loss costs"
TEXT = (
    "Held-out {unit} at the end of each run, lower is better; bars run from the lowest to the highest seed. The "
    "stepped line joins the variants that no other one beats in both: it goes by means and is no verdict."
)


def frontier(comparison: Comparison, cast: Cast) -> Section:
    """One chart for each cost that was measured and in which variants differ; the others are named."""
    charts, alike, unknown = [], [], []
    for key, title, cost in _costs(cast):
        points = _points(comparison, cast, cost)
        places = [point["x"] for point in points]
        if len(points) < 2:
            unknown.append(title)
        elif max(places) <= min(places) * (1 + ALIKE):
            alike.append(title)
        else:
            log = min(places) > 0 and max(places) / min(places) > LOGARITHMIC
            data = {"points": points, "front": _front(points), "x": title, "unit": comparison.measure.name, "log": log}
            charts.append(Chart(f"cost-{key}", "points", f"Against {title}", comparison.measure.name, data))
    text = TEXT.format(unit=comparison.measure.name)
    if charts and alike:
        text += f" Not drawn, since all variants have the same: {', '.join(alike)}."
    if charts and unknown:
        text += f" Not known: {', '.join(unknown)}."
    return Section(TITLE, text, charts)


Cost = Callable[[Line], float | None]


def _costs(cast: Cast) -> list[tuple[str, str, Cost]]:
    def memory(line: Line) -> float | None:
        peaks = [max(values) for run in cast.counted(line) if (values := run.curve(MEMORY)[1])]
        return float(np.mean(peaks)) if peaks else None

    return [
        ("flops", "FLOPs served", lambda line: line.flops),
        ("active", "active parameters", lambda line: line.parameters_active_served or line.parameters_active),
        ("total", "total parameters", lambda line: line.parameters_total),
        ("seconds", "seconds of training", lambda line: line.seconds),
        ("memory", "peak memory in GB", memory),
    ]


def _points(comparison: Comparison, cast: Cast, cost: Cost) -> list[dict[str, Any]]:
    """Of the variants that finished."""
    points = []
    for place, line in enumerate(cast.lines):
        spent = cost(line)
        if line.status != "finished" or line.score is None or not spent:
            continue
        scores = _scores(cast.counted(line), comparison)
        points.append({"v": place, "x": short(spent), "y": short(line.score), "low": short(min(scores)),
                       "high": short(max(scores))})  # fmt: skip
    return points


def _scores(runs: Sequence[Run], comparison: Comparison) -> list[float]:
    return [value for run in runs if (value := score(run, comparison.measure)) is not None]


def _front(points: Sequence[dict[str, Any]]) -> list[int]:
    """Places in `points` of those that cost less than every better one, cheapest first."""
    order = sorted(range(len(points)), key=lambda place: (points[place]["x"], points[place]["y"]))
    front: list[int] = []
    for place in order:
        if not front or points[place]["y"] < points[front[-1]]["y"]:
            front.append(place)
    return front
