"""The report's charts of what runs logged, section by section: curves with bands over seeds, and what they end in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moelab_tools.compare.bands import Band, band, short
from moelab_tools.compare.charts import Cast, Chart, Section
from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.frontier import frontier
from moelab_tools.compare.layers import balance_by_layer, loads_at_the_end
from moelab_tools.compare.reach import longer_texts
from moelab_tools.compare.runs import Run

MOST_POINTS, ALL_POINTS, LEAST_POINTS = 240, 4000, 40  # of a curve, of all curves of a chart, of a curve nevertheless
WARM_UP = 0.1  # of a loss: left out of the first view, where it falls from its start
FEWEST = 2  # points that a view needs
AXIS_TITLES = {"tokens": "tokens", "flops": "FLOPs served", "seconds": "seconds of training"}
BANDS = "Lines are means over seeds, bands run from the lowest to the highest seed."


def sections(comparison: Comparison, cast: Cast) -> list[Section]:
    """All charts that have something to show."""
    tag, unit = comparison.measure.tag, comparison.measure.name
    training = "train/lm_loss" if any(run.curve("train/lm_loss")[0] for run in comparison.runs) else "train/loss"
    plot = _Plot(cast, (tag, training))
    found = [
        frontier(comparison, cast),
        Section(
            "Held-out loss along the run",
            f"{unit.capitalize()} on {_new(comparison)}. Lower is better.{_bands(comparison)}",
            [plot.curve(tag, axis, f"Against {title}", unit, marks=True) for axis, title in AXIS_TITLES.items()],
        ),
        Section(
            "Held-out loss by place",
            f"{unit.capitalize()} of the final evaluation, by how many tokens stand before the target: in its "
            f"sequence, and of its own document.{_bands(comparison)}",
            [
                plot.places("position", comparison, "Tokens before it in its sequence"),
                plot.places("context", comparison, "Tokens of its own document before it"),
            ],
        ),
        longer_texts(cast),
        Section(
            "Training loss",
            "Language-model loss of the training batches; long runs are averaged over 1/40 of their length."
            + _bands(comparison),
            [plot.curve(training, "tokens", "Against tokens", "nats per token", smooth=True, wide=True)],
        ),
        Section(
            "Expert balance",
            f"Means over the layers. Formulas and what is alarming: docs/metrics.md.{_bands(comparison)}",
            [
                plot.curve("moe/mean/max_violation", "tokens", "MaxVio", "the fullest expert's excess; 0 is best"),
                plot.curve("moe/mean/dead_fraction", "tokens", "Dead experts", "share without any token; 0 is best"),
                plot.curve("moe/mean/load_entropy", "tokens", "Load entropy", "1: all experts equally loaded"),
                plot.curve("moe/mean/router_entropy", "tokens", "Router entropy", "nats; 0: certain of each token"),
                plot.curve(
                    "moe/mean/rank_violation", "tokens", "Rank violation",
                    "the fullest expert-parallel process's excess; 0 is best",
                ),
            ],
        ),
        balance_by_layer(cast),
        loads_at_the_end(cast),
        Section(
            "Throughput",
            f"As measured; comparable only on one machine that did nothing else.{_bands(comparison)}",
            [
                plot.curve("perf/tokens_per_second", "tokens", "Tokens per second", "tokens/s", zero=True),
                plot.curve("perf/memory_gb", "tokens", "Peak memory so far", "GB", zero=True),
                plot.curve("perf/mfu", "tokens", "Model FLOPs utilisation", "of the machine's peak", zero=True),
            ],
        ),
    ]  # fmt: skip
    filled = [
        replace(one, charts=[c for c in one.charts if c.data], more=[c for c in one.more if c.data]) for one in found
    ]
    return [section for section in filled if section.charts]


def _new(comparison: Comparison) -> str:
    """What is known of the text that is scored."""
    if comparison.seen:
        return "held-out text, not all of it new to the weights (see above)"
    return "text that neither these runs nor the weights they start from have trained on"


def _bands(comparison: Comparison) -> str:
    return f" {BANDS}" if any(line.counted > 1 for line in comparison.lines) else ""


@dataclass
class _Plot:
    cast: Cast
    losses: tuple[str, ...]  # tags whose first view begins after the fall from the start

    def curve(
        self, tag: str, axis: str, title: str, unit: str, *, marks: bool = False, smooth: bool = False,
        zero: bool = False, wide: bool = False,
    ) -> Chart:  # fmt: skip
        """`tag` of every variant that has it, against `axis`; without data where none has."""
        most = min(MOST_POINTS, max(ALL_POINTS // len(self.cast.lines), LEAST_POINTS))
        lines: list[dict[str, Any]] = []
        shared: list[list[float]] = []  # x of lines that log at the same places, once
        for place, line in enumerate(self.cast.lines):
            found = band(self.cast.counted(line), tag, axis, most=most, smooth=smooth)
            if found is not None:
                if found.x not in shared:
                    shared.append(found.x)
                lines.append({"v": place, "x": shared.index(found.x)} | _numbers(found))
        data: dict[str, Any] = {}
        if lines:
            data = {"lines": lines, "xs": shared, "x": AXIS_TITLES[axis], "unit": unit, "marks": marks, "zero": zero}
            data["view"] = _view(lines, shared) if tag in self.losses else None
        return Chart(f"{tag}-{axis}".replace("/", "-"), "curves", title, unit, data, wide)

    def places(self, kind: str, comparison: Comparison, title: str) -> Chart:
        """The final loss of each variant by bins of places, where it was logged in the comparison's unit."""
        prefix = f"eval_{kind}/{comparison.measure.tag.removeprefix('eval/')}/"
        lines: list[dict[str, Any]] = []
        shared: list[list[str]] = []
        for place, line in enumerate(self.cast.lines):
            finals = [_finals(run, prefix) for run in self.cast.counted(line)]
            bins = [name for name in finals[0] if all(name in one for one in finals)]
            if bins:
                names = [_bin(name) for name in bins]
                if names not in shared:
                    shared.append(names)
                values = [[one[name] for one in finals] for name in bins]
                found = Band([], [sum(one) / len(one) for one in values], *_ends(values), len(finals))
                lines.append({"v": place, "x": shared.index(names)} | _numbers(found))
        data = {"lines": lines, "xs": shared, "x": "tokens before the target", "unit": comparison.measure.name,
                "marks": True, "zero": False, "view": None, "names": max(shared, key=len)} if lines else {}  # fmt: skip
        return Chart(f"places-{kind}", "curves", title, comparison.measure.name, data)


def _bin(name: str) -> str:
    """`004-007` -> `4–7`."""
    return "–".join(str(int(end)) if end.isdecimal() else end for end in name.split("-"))


def _numbers(found: Band) -> dict[str, Any]:
    """Low and high only where there is a band to show."""
    numbers: dict[str, Any] = {"y": [short(value) for value in found.mean]}
    if found.runs > 1:
        numbers |= {"low": [short(value) for value in found.low], "high": [short(value) for value in found.high]}
    return numbers


def _ends(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [min(one) for one in values], [max(one) for one in values]


def _finals(run: Run, prefix: str) -> dict[str, float]:
    final = run.summary.get("final") or {}
    return {tag.removeprefix(prefix): float(final[tag]) for tag in sorted(final) if tag.startswith(prefix)}


def _view(lines: Sequence[dict[str, Any]], xs: Sequence[Sequence[float]]) -> list[float] | None:
    """The y values of the first view, without the fall from the start (WARM_UP of each curve); None: all of them."""
    seen: list[float] = []
    for line in lines:
        places = xs[line["x"]]
        skipped = sum(x <= WARM_UP * places[-1] for x in places)
        if len(places) - skipped < FEWEST:
            return None
        seen += [value for key in ("y", "low", "high") for value in line.get(key, [])[skipped:]]
    everything = [value for line in lines for value in line["y"]]
    room = 0.05 * (max(seen) - min(seen)) or 0.05 * abs(max(seen))
    view = [min(seen) - room, max(seen) + room]
    return view if min(everything) < view[0] or max(everything) > view[1] else None
