"""Differences to the baseline with their intervals and words: the first charts of the report, and those by domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelab_tools.compare import sentences, wording
from moelab_tools.compare import verdict as words
from moelab_tools.compare.bands import short
from moelab_tools.compare.budgets import AXES
from moelab_tools.compare.charts import Cast, Chart, label
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.judging import DomainDifference
from moelab_tools.compare.verdict import Verdict

GOOD, BAD, OPEN = "good", "bad", "open"  # classes of the page: green, red, and no verdict
TONES = {words.BETTER: GOOD, words.LIKELY[words.BETTER]: GOOD, words.WORSE: BAD, words.LIKELY[words.WORSE]: BAD}
NOTE = "Dot: difference; line: 95 % interval; left of 0 is lower. Green: better, red: worse, grey: no verdict."
FAR, FEWEST = 4.0, 4  # times the upper quartile of how far so many intervals reach: an axis beyond hides the others


def forest(comparison: Comparison, cast: Cast) -> Chart | None:
    """At the end of each run; None where there is no difference to show."""
    found = [(place, line, line.difference) for place, line in enumerate(cast.lines)]
    band = f" The band is what --practical calls negligible ({100 * comparison.rules.practical:g} %)."
    return _chart(comparison, "forest", "Differences to the baseline", NOTE + band, found, wide=True)


def at_equal_budgets(comparison: Comparison, cast: Cast) -> list[Chart]:
    """The same at equal tokens, FLOPs and seconds; without those that say what the first chart says."""
    charts = []
    for axis in AXES:
        budget = next((one for one in comparison.budgets if one.axis == axis), None)
        found = [(place, line, line.at_equal.get(axis)) for place, line in enumerate(cast.lines)]
        if budget is None or all(_same(one, line.difference) for _, line, one in found):
            continue
        title = f"At equal {sentences.AXIS_NAMES[axis]} ({wording.spend(budget)})"
        chart = _chart(comparison, f"forest-{axis}", title, "", found)
        charts += [chart] if chart is not None else []
    return charts


def _same(one: Verdict | None, end: Verdict | None) -> bool:
    if one is None or end is None or one.difference is None or end.difference is None:
        return one is None
    return one.verdict == end.verdict and abs(one.difference - end.difference) < 1e-9


def by_domain(comparison: Comparison, cast: Cast) -> tuple[list[Chart], list[Chart]]:
    """-> (charts of the variants in colour, of the others): a row a domain. No words: none were asked for."""
    base = label(comparison.baseline or "")
    found = {
        place: [
            (domain, known[line.name])
            for domain, known in comparison.differences_by_domain.items()
            if line.name in known
        ]
        for place, line in enumerate(cast.lines)
    }
    charts: tuple[list[Chart], list[Chart]] = ([], [])
    for main, into in ((True, charts[0]), (False, charts[1])):
        places = [place for place, known in found.items() if known and cast.is_main(place) == main]
        reach = _reach([_interval(one) for place in places for _, one in found[place]])
        for place in places:
            rows = [_row(f"{label(domain)} ({one.documents})", place, one, OPEN, "") for domain, one in found[place]]
            title = f"{label(cast.lines[place].name)} against {base}"
            data = _data(comparison, rows, reach, band=False)
            into.append(Chart(f"domains-{place}", "intervals", title, "", data))
    return charts


def _chart(
    comparison: Comparison, name: str, title: str, note: str, found: Sequence[tuple[int, Line, Verdict | None]], *,
    wide: bool = False,
) -> Chart | None:  # fmt: skip
    known = [(place, line, one) for place, line, one in found if one is not None and one.difference is not None]
    if not known:
        return None
    rows = [
        _row(label(line.name), place, one, TONES.get(one.verdict, OPEN), wording.word(line, one.verdict, one))
        for place, line, one in known
    ]
    reach = _reach([_interval(one) for _, _, one in known])
    return Chart(name, "intervals", title, note, _data(comparison, rows, reach, band=True), wide)


def _interval(one: Verdict | DomainDifference) -> tuple[float, float]:
    """The difference itself where no interval is known."""
    middle = one.difference or 0.0
    return (middle if one.low is None else one.low), (middle if one.high is None else one.high)


def _row(name: str, place: int, found: Verdict | DomainDifference, tone: str, word: str) -> dict[str, Any]:
    difference, low, high = found.difference or 0.0, found.low, found.high
    interval = "" if low is None or high is None else f" [{wording.signed(low)}, {wording.signed(high)}]"
    return {
        "name": name, "v": place, "x": short(difference), "low": None if low is None else short(low),
        "high": None if high is None else short(high), "tone": tone, "word": word,
        "text": wording.signed(difference) + interval,
    }  # fmt: skip


def _data(
    comparison: Comparison, rows: list[dict[str, Any]], reach: tuple[float, float], *, band: bool
) -> dict[str, Any]:
    base = next((line.score for line in comparison.lines if line.name == comparison.baseline), None)
    return {
        "rows": rows,
        "unit": comparison.measure.name,
        "axis": f"{comparison.measure.name} above {label(comparison.baseline or '')}",
        "reach": [short(end) for end in reach],
        "band": short(comparison.rules.practical * base) if band and base else 0.0,
        "base": short(base) if base else None,
    }


def _reach(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Both ends of an axis that holds 0; what goes far beyond the other intervals is cut, and so drawn."""
    if not intervals:
        return 0.0, 0.0
    ends = sorted(max(abs(low), abs(high)) for low, high in intervals)
    limit = FAR * ends[(3 * (len(ends) - 1)) // 4] if len(ends) >= FEWEST else ends[-1]
    low = min(0.0, *(max(low, -limit) for low, _ in intervals))
    high = max(0.0, *(min(high, limit) for _, high in intervals))
    room = 0.04 * (high - low) or 1.0
    return low - room, high + room
