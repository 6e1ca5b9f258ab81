"""Numbers and verdicts as people read them, the same in the terminal and in the report."""

from __future__ import annotations

from moelab_tools.compare.budgets import Budget
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


def active(line: Line) -> str:
    """Parameters that a token passed through, as served; as declared, and said so, where the run did not count."""
    if line.parameters_active_served is not None:
        return amount(line.parameters_active_served)
    return f"{amount(line.parameters_active)} declared" if line.parameters_active is not None else MISSING


def at_budget(comparison: Comparison, line: Line, axis: str) -> str:
    """The loss at the equal budget, with * for a run that went on and ~ for a roughly interpolated one."""
    value = line.at_equal_tokens if axis == "tokens" else line.at_equal_flops
    budget = next((one for one in comparison.budgets if one.axis == axis), None)
    if value is None or budget is None:
        return MISSING
    rough = "~" if set(line.runs) & set(budget.rough) else ""
    return f"{rough}{loss(value)}{'*' if set(line.runs) & set(budget.cut_short) else ''}"


def budgets(comparison: Comparison) -> list[str]:
    """One sentence for each equal budget, then what its marks mean."""
    told = [_budget(comparison, budget) for budget in comparison.budgets]
    if any(budget.cut_short for budget in comparison.budgets):
        told.append(
            "* went on after that point: its learning rate had not come down there yet, so a run of that length would "
            "have ended lower."
        )
    if any(budget.rough for budget in comparison.budgets):
        told.append("~ its nearest evaluation is more than 10 % of the budget away: set evaluation.every lower.")
    return told


def _budget(comparison: Comparison, budget: Budget) -> str:
    what = amount(budget.amount) if budget.axis == "tokens" else f"{flops(budget.amount)} served"
    field = "at_equal_tokens" if budget.axis == "tokens" else "at_equal_flops"
    known = [line for line in comparison.lines if getattr(line, field) is not None]
    known.sort(key=lambda line: float(getattr(line, field)))
    listing = ", ".join(f"{line.name} {at_budget(comparison, line, budget.axis)}" for line in known) or "none known"
    spent = f"all that {budget.spent_by} spent" if budget.cut_short else "what each spent"
    text = f"At equal {'FLOPs' if budget.axis == 'flops' else 'tokens'} ({what}, {spent}), "
    text += f"{budget.unit}: {listing}."
    if budget.between:
        spans = ", ".join(
            f"{run} between {low / budget.amount:.2f} and {high / budget.amount:.2f} of it"
            for run, (low, high) in budget.between.items()
        )
        text += f" Interpolated linearly from the evaluations around it: {spans}."
    for run, why in budget.missing.items():
        text += f" {run} {why}."
    return text


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
