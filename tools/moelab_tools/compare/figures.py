"""The report's charts as plain Plotly data: traces and layout, without colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.runs import Run

# Okabe & Ito's palette: told apart by people who see colours differently, on light and on dark ground.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#7f7f7f", "#b8a500")
DASHES = ("solid", "dash", "dot", "dashdot")  # the seeds of one variant
MOST_POINTS, ALL_POINTS = 600, 12_000  # of a curve, and of all curves of a chart where there are many runs
LEAST_POINTS = 2 * 40
SMOOTHING = 40  # a training curve is averaged over this part of its points
WARM_UP = 0.1  # of a curve: left out of the first view, where the loss falls from its start
AXIS_TITLES = {"tokens": "tokens", "flops": "FLOPs served", "seconds": "seconds of training"}
FAIR_SHARES = 4.0  # the end of the heatmaps' scale, as in TensorBoard
HEAT = [
    [0.0, "#000000"], [0.001, "#1c327d"], [0.125, "#78a0d7"], [0.25, "#e8e8e4"], [0.5, "#f0963c"], [1.0, "#8c0a19"],
]  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One figure; `wide` ones take a whole row."""

    id: str
    title: str
    note: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)


def run_styles(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Run -> (colour, dash): one colour a variant, one dash a seed."""
    styles = {}
    for index, line in enumerate(comparison.lines):
        for number, run in enumerate(line.runs):
            styles[run] = (COLOURS[index % len(COLOURS)], DASHES[number % len(DASHES)])
    return styles


def sections(comparison: Comparison) -> list[Section]:
    """All charts that have something to show."""
    plot = _Plot(comparison.runs, run_styles(comparison))
    held_out = [plot.curve("eval/loss", axis, "Held-out loss", markers=True) for axis in AXIS_TITLES]
    training_tag = "train/lm_loss" if any(run.curve("train/lm_loss")[0] for run in comparison.runs) else "train/loss"
    training = [plot.curve(training_tag, axis, "Training loss", smooth=True) for axis in AXIS_TITLES]
    balance = [
        plot.curve("moe/mean/max_violation", "tokens", "MaxVio", note="the fullest expert's excess; 0 is best"),
        plot.curve("moe/mean/dead_fraction", "tokens", "Dead experts", note="share without any token; 0 is best"),
        plot.curve("moe/mean/load_entropy", "tokens", "Load entropy", note="1: all experts equally loaded"),
        plot.curve("moe/mean/router_entropy", "tokens", "Router entropy", note="nats; 0: certain of each token"),
    ]  # fmt: skip
    speed = [
        plot.curve("perf/tokens_per_second", "tokens", "Tokens per second"),
        plot.curve("perf/mfu", "tokens", "Model FLOPs utilisation", note="of the machine's peak, FLOPs served"),
        plot.curve("perf/memory_gb", "tokens", "Peak memory", note="GB"),
    ]
    found = [
        Section("Held-out loss", f"Nats per token on {_new(comparison)}. Lower is better.", held_out),
        Section(
            "Held-out loss by place",
            f"{comparison.measure.name.capitalize()} of the final evaluation, by how many tokens stand before the "
            "target: in its sequence, and of its own document.",
            [
                plot.places("position", comparison, "Tokens before it in its sequence"),
                plot.places("context", comparison, "Tokens of its own document before it"),
            ],
        ),
        Section(
            "Training loss",
            f"Language-model loss of the training batches, averaged over 1/{SMOOTHING} of the run; pale: each logged "
            "step. Double-click a chart to see all of it.",
            training,
        ),
        Section("Expert balance", "Means over the layers, against tokens. Formulas: docs/metrics.md.", balance),
        Section(
            "Expert load at the end",
            "One row a layer, one column an expert. Grey: its fair share; red: four times that; black: no token.",
            [chart for run in comparison.runs if (chart := _heatmap(run))],
        ),
        Section("Throughput", "As measured; comparable only on one machine that did nothing else.", speed),
    ]
    filled = [Section(s.title, s.text, [chart for chart in s.charts if chart and chart.traces]) for s in found]
    return [section for section in filled if section.charts]


def _new(comparison: Comparison) -> str:
    """What is known of the text that is scored."""
    if comparison.seen:
        return "held-out text, not all of it new to the weights (see above)"
    return "text that neither these runs nor the weights they start from have trained on"


@dataclass
class _Plot:
    runs: Sequence[Run]
    styles: dict[str, tuple[str, str]]

    def curve(
        self, tag: str, axis: str, title: str, *, note: str = "", markers: bool = False, smooth: bool = False
    ) -> Chart:
        """`tag` of every run that has it, against `axis`."""
        traces: list[dict[str, Any]] = []
        seen: list[float] = []  # y values that the first view must show
        before: list[float] = []  # those before the first step
        for run in self.runs:
            x, y = _thin(*run.curve(tag, axis), most=min(MOST_POINTS, max(ALL_POINTS // len(self.runs), LEAST_POINTS)))
            if not x:
                continue
            colour, dash = self.styles[run.name]
            line = {"color": colour, "width": 2, "dash": dash}
            common = {"x": x, "name": run.name, "legendgroup": run.name, "type": "scatter", "mode": "lines"}
            if smooth:
                traces.append(common | {"y": y, "line": line | {"width": 1}, "opacity": 0.25, "hoverinfo": "skip"})
                y = _running_mean(y, max(1, len(y) // SMOOTHING))
            marks = {"mode": "lines+markers", "marker": {"size": 7, "color": colour}} if markers else {}
            traces.append(common | {"y": [round(value, 6) for value in y], "line": line} | marks)
            seen += y[int(len(y) * WARM_UP) :] if smooth else [one for at, one in zip(x, y, strict=True) if at > 0]
            before += [one for at, one in zip(x, y, strict=True) if at == 0]
        layout: dict[str, Any] = {"xaxis": {"title": {"text": AXIS_TITLES[axis]}}, "yaxis": {}}
        if tag.startswith("perf/"):
            layout["yaxis"]["rangemode"] = "tozero"
        far = bool(markers and seen and before) and max(before) > 2 * max(seen) - min(seen)
        if far:
            note = "untrained at 0, above this view: double-click to see it"
        if seen and (smooth or far):
            low, high = min(seen), max(seen)
            room = 0.05 * (high - low) or 0.05 * abs(high)
            layout["yaxis"]["range"] = [low - room, high + room]
        against = f" against {AXIS_TITLES[axis]}" if axis != "tokens" or "loss" in title else ""
        return Chart(f"{tag}-{axis}".replace("/", "-"), title + against, note, traces, layout)

    def places(self, kind: str, comparison: Comparison, title: str) -> Chart:
        """The final loss of each run by bins of places, where it was logged in the comparison's unit."""
        prefix = f"eval_{kind}/{comparison.measure.tag.removeprefix('eval/')}/"
        traces: list[dict[str, Any]] = []
        for run in self.runs:
            final = run.summary.get("final") or {}
            found = {tag.removeprefix(prefix): float(final[tag]) for tag in sorted(final) if tag.startswith(prefix)}
            if found:
                colour, dash = self.styles[run.name]
                traces.append({
                    "x": list(found), "y": [round(value, 6) for value in found.values()], "name": run.name,
                    "legendgroup": run.name, "type": "scatter", "mode": "lines+markers",
                    "line": {"color": colour, "width": 2, "dash": dash}, "marker": {"size": 6, "color": colour},
                })  # fmt: skip
        layout = {"xaxis": {"type": "category", "title": {"text": "tokens before the target"}}, "yaxis": {}}
        return Chart(f"places-{kind}", title, "", traces, layout)


def _heatmap(run: Run) -> Chart | None:
    """Multiples of the fair share over (layer, expert); layers with fewer experts end early."""
    loads = {int(layer): shares for layer, shares in run.summary.get("expert_load", {}).items() if shares}
    if not loads:
        return None
    layers = sorted(loads)
    most = max(len(shares) for shares in loads.values())
    rows = []
    for layer in layers:
        shares = loads[layer]
        rows.append([round(share * len(shares), 4) for share in shares] + [None] * (most - len(shares)))
    trace = {
        "type": "heatmap", "z": rows, "y": [f"layer {layer}" for layer in layers], "x": list(range(most)),
        "zmin": 0, "zmax": FAIR_SHARES, "colorscale": HEAT, "xgap": 1, "ygap": 1, "name": run.name,
        "colorbar": {"title": {"text": "× fair share"}, "thickness": 10},
        "hovertemplate": "%{y}, expert %{x}: %{z:.2f} × fair share<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "expert"}, "showgrid": False, "zeroline": False},
        "yaxis": {"autorange": "reversed", "showgrid": False, "zeroline": False},
        "height": 150 + 26 * len(layers),
    }
    worst = max(max(value for value in row if value is not None) for row in rows)
    dead = sum(value == 0 for row in rows for value in row)
    note = f"fullest expert: {worst:.2f} × its fair share; experts without a token: {dead}"
    return Chart(f"load-{run.name}", run.name, note, [trace], layout, wide=most > 32)


def _thin(x: list[float], y: list[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points, each the mean of those it stands for; the first stays what it is."""
    if len(x) <= most:
        return x, y
    size = math.ceil((len(x) - 1) / (most - 1))
    starts = np.concatenate([[0], np.arange(1, len(x), size)])
    counts = np.diff(np.append(starts, len(x)))
    first, second = ((np.add.reduceat(values, starts) / counts).tolist() for values in (x, y))
    return first, second


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values; of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return [float(value) for value in (sums[ends] - sums[starts]) / (ends - starts)]
