"""Numbers and verdicts as people read them, the same in the terminal and in the report."""

from __future__ import annotations

from moelab_tools.compare.comparison import Comparison, Line

MISSING = "–"
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def amount(value: float | None) -> str:
    """1234567 -> 1.23M: parameters and tokens."""
    if value is None:
        return MISSING
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def flops(value: float | None) -> str:
    return f"{value:.2e}".replace("e+", "e") if value else MISSING


def loss(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def decimal(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def signed(value: float) -> str:
    """With a true minus sign."""
    return f"{value:+.4f}".replace("-", "−")


def components(line: Line) -> str:
    """layout · router · losses, or that it has no experts."""
    known = line.components
    if not known.get("router"):
        return "no experts"
    parts = [known.get("layout", ""), known["router"], known.get("balance_losses") or known.get("loss", "")]
    return " · ".join(part if part != "none" else "no balance loss" for part in parts if part)


def headlines(comparison: Comparison) -> list[str]:
    """The answer first: who is best, then each other variant against the baseline."""
    scored = [line for line in comparison.lines if line.score is not None]
    if not scored:
        return ["No run has been evaluated on held-out text, so there is nothing to rank."]
    finished = [line for line in scored if line.status == "finished"]
    told = []
    if finished:
        best = finished[0]
        told.append(f"{best.name} has the lowest held-out loss: {loss(best.score)} {comparison.measure.name}.")
    for line in scored:
        if line.name != comparison.baseline:
            told.append(_against_baseline(line, comparison))
    if len(scored) == 1:
        told.append("It is the only run: give more to compare.")
    return told


def _against_baseline(line: Line, comparison: Comparison) -> str:
    other, unit, gap = comparison.baseline, comparison.measure.name, line.difference
    unfinished = "" if line.status == "finished" else f" ({line.status}, so this is not its final state)"
    if other is None or gap is None:
        return f"{line.name}: {loss(line.score)} {unit}, no interval{unfinished}."
    if gap.verdict == "not resolved":
        return (
            f"{line.name} and {other} can't be told apart: the difference is {signed(gap.difference)} {unit} and its "
            f"95 % interval, {signed(gap.low)} to {signed(gap.high)}, contains 0{unfinished}."
        )
    base = next(one.score for one in comparison.lines if one.name == other)
    share = f" ({100 * abs(gap.difference) / base:.1f} %)" if base else ""
    low, high = sorted((abs(gap.low), abs(gap.high)))
    return (
        f"{line.name} is {gap.verdict} than {other} by {abs(gap.difference):.4f} {unit}{share}; "
        f"95 % interval {low:.4f} to {high:.4f}{unfinished}."
    )


def what_intervals_cover(comparison: Comparison) -> list[str]:
    """The sentence that keeps a reader from concluding too much."""
    gaps = [line.difference for line in comparison.lines if line.difference]
    told = []
    for method in dict.fromkeys(gap.method for gap in gaps if gap.covers == "held-out text"):
        told.append(
            f"Interval: {method}. It covers the choice of held-out text, not of the training seed: training the same "
            "recipe again would move the result too. Train each with several values of seed and give all the runs to "
            "`moelab compare`; it groups them and takes the interval over seeds."
        )
    for method in dict.fromkeys(gap.method for gap in gaps if gap.covers == "training seeds"):
        told.append(f"Interval: {method}. It covers what another training seed would do, on this held-out text.")
    if len(gaps) > 1:
        told.append(f"Each of the {len(gaps)} intervals holds alone at 95 %; they are not corrected for being several.")
    return told
