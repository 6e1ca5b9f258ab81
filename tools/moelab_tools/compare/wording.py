"""Numbers and verdicts as people read them, the same in the terminal and in the report."""

from __future__ import annotations

from moelab_tools.compare.budgets import Budget
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.differences import some
from moelab_tools.compare.verdict import Verdict

MISSING = "–"
APART = "†"  # behind a word that its interval does not say
MOST_SPANS = 4  # runs: of more only the furthest spans are told
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
    """layout · router · losses · what single layers have instead, or that it has no experts."""
    known = line.components
    if not known.get("router"):
        return "no experts"
    parts = [known.get("layout", ""), known["router"], known.get("balance_losses") or known.get("loss", "")]
    parts += [f"layers {known['layers']}"] if known.get("layers") else []
    return " · ".join(part if part != "none" else "no balance loss" for part in parts if part)


def alarms(comparison: Comparison, line: Line) -> list[str]:
    """`alarm: untaught`: those that were on at the end of a run of this line; `sentences.alarms` says the rest."""
    names = [alarm.name for alarm in comparison.alarms if alarm.on and alarm.run in line.runs]
    return [f"alarm: {name}" for name in dict.fromkeys(names)]


def active(line: Line) -> str:
    """Parameters that a token passed through, as served; as declared, and said so, where the run did not count."""
    if line.parameters_active_served is not None:
        return amount(line.parameters_active_served)
    return f"{amount(line.parameters_active)} declared" if line.parameters_active is not None else MISSING


def at_budget(comparison: Comparison, line: Line, axis: str) -> str:
    """The loss at the equal budget, with * for a run that went on and ~ for a roughly interpolated one."""
    value = _at(line, axis)
    budget = next((one for one in comparison.budgets if one.axis == axis), None)
    if value is None or budget is None:
        return MISSING
    rough = "~" if set(line.runs) & set(budget.rough) else ""
    return f"{rough}{loss(value)}{'*' if set(line.runs) & set(budget.cut_short) else ''}"


def word(line: Line, verdict: str, found: Verdict | None) -> str:
    """A word of a variant, never without what it is said with; `found`: the numbers that it stands beside."""
    marked = f"{verdict} {APART}" if found is not None and found.apart else verdict
    return f"{marked}, {line.frozen}" if line.frozen else marked


def at_equal(comparison: Comparison, line: Line, axis: str) -> str:
    """The same with the word that the difference there got."""
    found = line.at_equal.get(axis)
    value = at_budget(comparison, line, axis)
    return f"{value} {word(line, found.verdict, found)}" if found is not None else value


def in_domain(comparison: Comparison, line: Line, domain: str) -> float | None:
    """Held-out loss of a domain, averaged over the variant's runs that know it."""
    known = [value for run in line.runs if (value := comparison.domains[domain].get(run)) is not None]
    return sum(known) / len(known) if known else None


def lowest_in_domain(comparison: Comparison, domain: str) -> float | None:
    """Of all variants."""
    known = [in_domain(comparison, line, domain) for line in comparison.lines]
    return min((value for value in known if value is not None), default=None)


def budgets(comparison: Comparison) -> list[str]:
    """One sentence for each equal budget, then what its marks mean."""
    told = [_budget(comparison, budget) for budget in comparison.budgets]
    shown = [at_budget(comparison, line, budget.axis) for budget in comparison.budgets for line in comparison.lines]
    if any(value.endswith("*") for value in shown):
        told.append(
            "* went on after that point: its learning rate had not come down there yet, so a run of that length would "
            "have ended lower."
        )
    if any(value.startswith("~") for value in shown):
        told.append("~ its nearest evaluation is more than 10 % of the budget away: set evaluation.every lower.")
    return told


def _budget(comparison: Comparison, budget: Budget) -> str:
    names = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal seconds of training"}
    known = [(value, line) for line in comparison.lines if (value := _at(line, budget.axis)) is not None]
    listing = ", ".join(
        f"{line.name} {at_budget(comparison, line, budget.axis)}{_verdict_at(line, budget.axis)}"
        for _, line in sorted(known, key=lambda one: one[0])
    )
    spent = f"all that {budget.spent_by} spent" if budget.cut_short else "what each spent"
    text = f"At {names[budget.axis]} ({spend(budget)}, {spent}), {budget.unit}: {listing or 'none known'}."
    if budget.between:
        text += f" Interpolated linearly from the evaluations around it: {_spans(budget)}."
    for why in dict.fromkeys(budget.missing.values()):
        text += f" {some([run for run, reason in budget.missing.items() if reason == why])}: {why}."
    return text


def _spans(budget: Budget) -> str:
    """Where the evaluations were that each run is read between; of many runs, those that were furthest."""
    spans = {run: (low / budget.amount, high / budget.amount) for run, (low, high) in budget.between.items()}
    if len(spans) <= MOST_SPANS:
        return ", ".join(f"{run} between {low:.2f} and {high:.2f} of it" for run, (low, high) in spans.items())
    low, high = min(low for low, _ in spans.values()), max(high for _, high in spans.values())
    return f"{len(spans)} runs, by evaluations from {low:.2f} to {high:.2f} of it"


def spend(budget: Budget) -> str:
    """The amount of an equal budget, with its unit where the axis does not say it."""
    if budget.axis == "tokens":
        return amount(budget.amount)
    return f"{flops(budget.amount)} served" if budget.axis == "flops" else f"{budget.amount:.0f} s"


def _at(line: Line, axis: str) -> float | None:
    return {"tokens": line.at_equal_tokens, "flops": line.at_equal_flops, "seconds": line.at_equal_seconds}[axis]


def _verdict_at(line: Line, axis: str) -> str:
    found = line.at_equal.get(axis)
    if found is None or found.difference is None:
        return ""
    interval = (
        f" [{signed(found.low)}, {signed(found.high)}]" if found.low is not None and found.high is not None else ""
    )
    return f" ({word(line, found.verdict, found)}: {signed(found.difference)}{interval})"
