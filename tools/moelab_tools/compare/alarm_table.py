"""Alarms by variant, for a page on which thirty runs with thirty layers must still be read."""

from __future__ import annotations

from dataclasses import dataclass

from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.routers import RunAlarm


@dataclass(frozen=True)
class AlarmRow:
    """One kind of alarm of one variant, over its runs and layers."""

    variant: str
    name: str
    on: int  # runs in which it was on at the end
    raised: int  # runs in which it was ever on
    runs: int
    layers: str
    first_step: int
    worst: float
    threshold: float
    nothing_learnt: bool  # it withholds the word "better"
    advice: str


def alarm_rows(comparison: Comparison) -> list[AlarmRow]:
    """Those that were on at the end first."""
    rows = []
    for line in comparison.lines:
        kinds: dict[str, list[RunAlarm]] = {}
        for alarm in comparison.alarms:
            if alarm.run in line.runs:
                kinds.setdefault(alarm.name, []).append(alarm)
        rows += [_row(line.name, name, len(line.runs), found) for name, found in kinds.items()]
    return sorted(rows, key=lambda row: (not row.nothing_learnt, -row.on))


def _row(variant: str, name: str, runs: int, alarms: list[RunAlarm]) -> AlarmRow:
    layers = sorted({alarm.layer for alarm in alarms if alarm.layer is not None})
    worst = max(alarms, key=lambda alarm: abs(alarm.worst - alarm.threshold))
    return AlarmRow(
        variant=variant,
        name=name,
        on=len({alarm.run for alarm in alarms if alarm.on}),
        raised=len({alarm.run for alarm in alarms}),
        runs=runs,
        layers=_spans(layers),
        first_step=min(alarm.first_step for alarm in alarms),
        worst=worst.worst,
        threshold=worst.threshold,
        nothing_learnt=any(alarm.nothing_learnt for alarm in alarms),
        advice=worst.advice,
    )


def _spans(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"; empty for a number of the whole run."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans) or "all"
