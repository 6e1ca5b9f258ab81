"""Layer by layer: how balance went over time, and how loaded each expert was at the end. Cells of a fixed scale."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moelab_tools.compare.charts import Cast, Chart, Section, label
from moelab_tools.compare.comparison import Line
from moelab_tools.compare.contrast import Floats
from moelab_tools.compare.runs import Run

BINS = 48  # of the run, in a picture of balance over time
STEPS = 254  # of a scale: a byte, of which the highest means that nothing is known
UNKNOWN = 255
MEASURES = {
    "max_violation": ("MaxVio", 4.0),
    "dead_fraction": ("dead experts", 1.0),
}  # metric -> (its name, the end of its scale)
FAIR_SHARES = 4.0  # the end of the loads' scale, as in TensorBoard
_LAYER = re.compile(r"moe/layer_(\d+)/max_violation")


def balance_by_layer(cast: Cast) -> Section:
    """A picture a variant: a row a layer, time to the right; one of MEASURES at a time."""
    return _by_variant(
        cast,
        "Balance by layer over time",
        "One row a layer, tokens to the right, means over seeds. A layer that goes wrong is a row of its own colour, "
        "which the means above hide.",
        _over_time,
    )


def _by_variant(cast: Cast, title: str, text: str, draw: Callable[[Sequence[Run], Line, int], Chart | None]) -> Section:
    """A chart for each variant that has one; those beyond the main ones are folded away."""
    charts: list[Chart] = []
    folded: list[Chart] = []
    for place, line in enumerate(cast.lines):
        chart = draw(cast.counted(line), line, place)
        if chart is not None:
            (charts if cast.is_main(place) else folded).append(chart)
    return Section(title, text, charts, folded)


def _over_time(runs: Sequence[Run], line: Line, place: int) -> Chart | None:
    layers = sorted({int(found[1]) for run in runs for key in _last_keys(run) if (found := _LAYER.fullmatch(key))})
    if not layers:
        return None
    pictures = {}
    for metric, (name, most) in MEASURES.items():
        rows = np.array([_binned(runs, f"moe/layer_{layer:02d}/{metric}") for layer in layers])
        if np.isfinite(rows).any():
            pictures[metric] = {"name": name, "most": most, "cells": _bytes(rows, most)}
    data = {
        "v": place, "rows": [f"layer {layer}" for layer in layers], "columns": BINS, "pictures": pictures,
        "end": max(run.amount("tokens") for run in runs), "axis": "tokens", "scale": "balance",
    }  # fmt: skip
    return Chart(f"layers-{place}", "cells", label(line.name), "", data) if pictures else None


def _last_keys(run: Run) -> list[str]:
    """Of the last row that has balance in it: all logged rows have the same."""
    return next((list(row) for row in reversed(run.rows) if "moe/mean/max_violation" in row), [])


def _binned(runs: Sequence[Run], tag: str) -> Floats:
    """[BINS]: means over runs and over each part of the tokens; NaN where nothing was logged."""
    sums, counts = np.zeros(BINS), np.zeros(BINS)
    for run in runs:
        x, y = run.curve(tag)
        if x:
            # A bin ends with the tokens that it stands for: the last step is in the last one.
            share = np.array(x) / max(run.amount("tokens"), x[-1])
            places = np.clip(np.ceil(share * BINS).astype(int) - 1, 0, BINS - 1)
            np.add.at(sums, places, y)
            np.add.at(counts, places, 1)
    means = np.full(BINS, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return _carried(means)


def _carried(values: Floats) -> Floats:
    """A bin between two logged ones shows the one before it: a run may log fewer times than there are bins."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return values
    before = np.searchsorted(known, np.arange(len(values)), side="right") - 1
    return np.where(before >= 0, values[known[np.maximum(before, 0)]], values[known[0]])


def loads_at_the_end(cast: Cast) -> Section:
    """A picture a variant, of the run whose fullest expert is the fullest."""
    return _by_variant(
        cast,
        "Expert load at the end",
        "One row a layer, one column an expert, in multiples of its fair share. Of several seeds the one with the "
        "fullest expert is shown.",
        _loads,
    )


def _loads(runs: Sequence[Run], line: Line, place: int) -> Chart | None:
    known = [(run, shares) for run in runs if (shares := _shares(run))]
    if not known:
        return None
    run, shares = max(known, key=lambda one: max(float(row.max()) for row in one[1].values()))
    most = max(len(row) for row in shares.values())
    rows = np.full((len(shares), most), np.nan)
    for place_of_row, row in enumerate(shares.values()):
        rows[place_of_row, : len(row)] = row
    data: dict[str, Any] = {
        "v": place, "rows": [f"layer {layer}" for layer in shares], "columns": most, "end": most, "axis": "experts",
        "scale": "load", "pictures": {"load": {"name": "× fair share", "most": FAIR_SHARES,
                                               "cells": _bytes(rows, FAIR_SHARES)}},
    }  # fmt: skip
    dead = int(np.count_nonzero(rows == 0))
    note = f"fullest expert {np.nanmax(rows):.2f} × its fair share; {dead} without a token"
    if len(known) > 1:
        note += f"; {label(run.name)}"
    return Chart(f"load-{place}", "cells", label(line.name), note, data)


def _shares(run: Run) -> dict[int, Floats]:
    """{layer: each expert's load in fair shares}, in the order of the layers."""
    loads = {int(layer): np.array(row, float) for layer, row in run.summary.get("expert_load", {}).items() if row}
    return {layer: loads[layer] * len(loads[layer]) for layer in sorted(loads)}


def _bytes(rows: Floats, most: float) -> str:
    """Row after row, a byte a cell: STEPS steps from 0 to `most`; 0 only for what is 0."""
    scaled = np.clip(np.nan_to_num(rows) / most, 0, 1) * STEPS
    coded = np.where(rows > 0, np.maximum(np.rint(scaled), 1), 0)
    coded = np.where(np.isfinite(rows), coded, UNKNOWN).astype(np.uint8)
    return base64.b64encode(coded.tobytes()).decode()
