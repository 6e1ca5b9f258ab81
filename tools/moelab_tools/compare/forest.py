"""The first chart of the report: every variant's difference to the baseline, with its intervals and their verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from moelab.printable import printable
from moelab_tools.compare import verdict as words
from moelab_tools.compare import wording
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.figures import Chart
from moelab_tools.compare.verdict import Verdict

GOOD, BAD, OPEN = "#12824a", "#c0392b", "#8a8f98"
COLOURS = {words.BETTER: GOOD, words.LIKELY[words.BETTER]: GOOD, words.WORSE: BAD, words.LIKELY[words.WORSE]: BAD}
END = "end"  # of each run: the difference that the headline is about
SYMBOLS = {END: "circle", "tokens": "circle-open", "flops": "triangle-up-open", "seconds": "square-open"}
NAMES = {END: "at the end of each run", "tokens": "at equal tokens", "flops": "at equal FLOPs",
         "seconds": "at equal seconds"}  # fmt: skip
NOTE = (
    "● at the end of each run; at equal ○ tokens, △ FLOPs, □ seconds. Green: better; red: worse; grey: no verdict. "
    "Left of 0 is lower. The band is what --practical calls negligible."
)
SPREAD = {END: 0.0, "tokens": 0.22, "flops": 0.36, "seconds": 0.5}  # of a row: how far below its first point
ROW, MARGIN = 44, 70  # pixels


def forest(comparison: Comparison) -> Chart | None:
    """None where there is no difference to show."""
    lines = [line for line in comparison.lines if line.difference and line.difference.difference is not None]
    base = next((line.score for line in comparison.lines if line.name == comparison.baseline), None)
    if not lines or not base:
        return None
    groups: dict[tuple[str, str], list[tuple[float, Line, Verdict]]] = {}
    for row, line in enumerate(lines):
        for axis, found in _differences(line):
            colour = COLOURS.get(found.verdict, OPEN)
            groups.setdefault((axis, colour), []).append((row + SPREAD[axis], line, found))
    traces = [_trace(axis, colour, points, base) for (axis, colour), points in groups.items()]
    limit = comparison.rules.practical * base
    band = {"type": "rect", "xref": "x", "yref": "paper", "x0": -limit, "x1": limit, "y0": 0, "y1": 1,
            "fillcolor": OPEN, "opacity": 0.18, "line": {"width": 0}, "layer": "below"}  # fmt: skip
    layout: dict[str, Any] = {
        "height": MARGIN + ROW * len(lines),
        "xaxis": {"title": {"text": f"{comparison.measure.name} above {_name(comparison.baseline or '')}"},
                  "zeroline": True, "zerolinewidth": 2},
        "yaxis": {"tickvals": list(range(len(lines))), "ticktext": [_name(line.name) for line in lines],
                  "range": [len(lines) - 0.2, -0.5], "showgrid": False, "zeroline": False},
        "shapes": [band],
    }  # fmt: skip
    return Chart("forest", "Differences to the baseline", NOTE, traces, layout, wide=True)


def _differences(line: Line) -> Iterator[tuple[str, Verdict]]:
    if line.difference is not None:
        yield END, line.difference
    for axis in AXES:
        found = line.at_equal.get(axis)
        if found is not None and found.difference is not None:
            yield axis, found


def _trace(axis: str, colour: str, points: list[tuple[float, Line, Verdict]], base: float) -> dict[str, Any]:
    large = axis == END
    half = [_half(found) for _, _, found in points]
    texts = [
        f"{_name(line.name)}, {NAMES[axis]}: {wording.signed(found.difference or 0.0)} "
        f"({100 * (found.difference or 0.0) / base:+.2f} %), {found.verdict}"
        for _, line, found in points
    ]
    return {
        "type": "scatter", "mode": "markers", "name": NAMES[axis], "x": [found.difference for _, _, found in points],
        "y": [place for place, _, _ in points], "text": texts, "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": colour, "symbol": SYMBOLS[axis], "size": 10 if large else 7},
        "error_x": {"type": "data", "array": half, "color": colour, "thickness": 2 if large else 1, "width": 0},
    }  # fmt: skip


def _half(found: Verdict) -> float:
    return 0.0 if found.low is None or found.high is None else (found.high - found.low) / 2


def _name(text: str) -> str:
    """Plotly reads tags in its labels."""
    return escape(printable(text, 60))
