"""The verdicts in words, the same in the terminal, the report and the JSON: what is known, and how well."""

from __future__ import annotations

from collections.abc import Sequence

from moelab_tools.compare import routers, wording
from moelab_tools.compare import verdict as words
from moelab_tools.compare.comparison import Comparison, Line
from moelab_tools.compare.power import MOST_SEEDS
from moelab_tools.compare.routers import NEVER_BETTER
from moelab_tools.compare.verdict import Verdict

AXIS_NAMES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}
NO_VERDICT = "no verdict below three pairs of seeds"
APART = {"tokens": 0.02, "flops": 0.02, "seconds": 0.1}  # relative: from which on two variants' spendings differ
RESOLVED = {words.BETTER, words.WORSE, words.BEST}


def everything(comparison: Comparison) -> list[str]:
    """All that is said in sentences, in this order: what each form of a comparison must hold."""
    return [
        *headlines(comparison), *wording.budgets(comparison), *multipliers(comparison), *remarks(comparison),
        *alarms(comparison), *what_intervals_cover(comparison),
    ]  # fmt: skip


def headlines(comparison: Comparison) -> list[str]:
    """The answer first: which is lowest, then each other variant against the baseline."""
    scored = [line for line in comparison.lines if line.score is not None]
    if not scored:
        return ["No run has been evaluated on held-out text, so there is nothing to rank."]
    told = [_first(comparison)] if scored[0].status == "finished" else []
    for line in scored:
        if line.name != comparison.baseline:
            told.append(against_baseline(line, comparison))
    if len(scored) == 1:
        told.append("It is the only run: give more to compare.")
    return told


def _first(comparison: Comparison) -> str:
    best = comparison.lines[0]
    text = f"{best.qualified} has the lowest held-out loss: {wording.loss(best.score)} {comparison.measure.name}"
    if best.untaught:
        return f"{text}, and that is no verdict: {best.untaught}."
    if best.verdict == words.BEST:
        return f"{text}, and every other variant is worse."
    if not comparison.rules.named and comparison.baseline != best.name:
        return f"{text}. Differences are to {comparison.baseline}, the lowest of those with three seeds or more."
    return f"{text}."


def against_baseline(line: Line, comparison: Comparison) -> str:
    """One variant in one or two sentences."""
    other, found, unit = comparison.baseline, line.difference, comparison.measure.name
    if line.status != "finished":
        return f"{line.qualified}: {wording.loss(line.score)} {unit}; {line.status}, so this is not its final state."
    if other is None or found is None:
        return f"{line.name}: {wording.loss(line.score)} {unit}, with nothing to compare it with."
    if found.difference is None:
        return (
            f"{line.name} and {other} share no seed, and one run is never compared with the mean of several: no "
            f"difference. Train {line.name} with the seeds of {other}."
        )
    base = next(one for one in comparison.lines if one.name == other)
    told = [
        _difference(line.qualified, base.qualified, found, unit, base.score),
        footing(line, base),
        could_have_seen(found, base.score),
    ]
    return " ".join(sentence for sentence in told if sentence)


def footing(line: Line, base: Line) -> str:
    """What the difference took, where the two did not spend alike, and what is left of it where they had."""
    spent = {axis: (getattr(line, axis), getattr(base, axis)) for axis in APART}
    ratios = {axis: mine / theirs for axis, (mine, theirs) in spent.items() if mine and theirs}
    apart = [axis for axis, ratio in ratios.items() if abs(ratio - 1) > APART[axis]]
    if not apart:
        return ""
    text = f"It took {_listed([f'{ratios[axis]:.2f} × the {AXIS_NAMES[axis]}' for axis in apart])} of {base.name}"
    left = [
        f"at equal {AXIS_NAMES[axis]} it is {abs(found.difference):.4f} {_side(found.difference)} "
        f"({found.verdict}{f' {wording.APART}' * found.apart})"
        for axis in apart
        if (found := line.at_equal.get(axis)) is not None and found.difference is not None
    ]
    return f"{text}; {_listed(left)}." if left else f"{text}."


def resolved(comparison: Comparison) -> bool:
    """Whether any comparison got one of the words better, worse and best."""
    return any(line.verdict in RESOLVED for line in comparison.lines)


def _side(difference: float) -> str:
    return "lower" if difference < 0 else "higher"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _difference(name: str, other: str, found: Verdict, unit: str, base: float | None) -> str:
    assert found.difference is not None
    how_much = f"{wording.signed(found.difference)} {unit}{share(found.difference, base)}"
    amount = f"{abs(found.difference):.4f} {unit}{share(found.difference, base)}"
    interval = f"interval {between(found)}{parts(found)}"
    lower = _side(found.difference)
    if found.verdict == words.IDENTICAL:
        return f"{name} and {other} gave the same result to the last bit."
    if found.verdict == words.ONE_SEED:
        return (
            f"{name} ended {amount} {lower} than {other} on this text; {interval}, over documents alone. With one seed "
            f"that can be luck: {NO_VERDICT}."
        )
    if found.verdict == words.TWO_SEEDS:
        return f"{name} ended {amount} {lower} than {other} with two seeds; {interval}: {NO_VERDICT}."
    if found.verdict == words.WITHHELD:
        return (
            f"{name} ended {amount} {lower} than {other}; {interval}. No verdict: the router of the lower one has "
            "learnt nothing."
        )
    if found.verdict == words.NO_SPREAD:
        return (
            f"{name} ended {amount} {lower} than {other} in every pair of seeds alike: the seeds change nothing here."
        )
    if found.verdict == words.NOT_RESOLVED:
        most = max(abs(found.low or 0.0), abs(found.high or 0.0))
        text = f"{name} and {other} can't be told apart: the difference is {how_much}, {interval}{_by_holm(found)}"
        return f"{text}." if found.apart else f"{text}; up to {most:.4f}{share(most, base)} either way is possible."
    if found.verdict == words.NEGLIGIBLE:
        return f"{name} and {other} differ by less than what counts: {how_much}, {interval}."
    return f"{name} is {found.verdict} than {other}: {how_much}, {interval}{_by_holm(found)}."


def _by_holm(found: Verdict) -> str:
    """Holm's words can be a little ahead of the intervals that hold for all comparisons at once, or behind them."""
    if not found.apart:
        return ""
    p = "" if found.p is None else f"p {found.p:.3f} "
    reaches = "leaves 0 out" if found.verdict == words.NOT_RESOLVED else "reaches 0"
    return f"; {p}by Holm, though the interval that holds for all comparisons at once {reaches}"


def could_have_seen(found: Verdict, base: float | None) -> str:
    """What a true difference had to be, and what a smaller one needs."""
    if found.could_have_seen is None or not base:
        return ""
    seeds = f"{found.pairs} {'pairs' if found.paired else 'seeds each'}"
    text = f"With {seeds} it could have seen {100 * found.could_have_seen / base:.2g} %"
    if found.smaller is None:
        return f"{text}."
    smaller = f"{100 * found.smaller / base:g} %"
    if found.seeds_for_smaller is not None:
        return f"{text}; for {smaller} it needs {found.seeds_for_smaller}."
    if found.seen_at_best is None or found.seen_at_best < found.smaller:
        return f"{text}; for {smaller} it needs more than {MOST_SEEDS}."
    best = f"to {100 * found.seen_at_best / base:.2g} % at best"
    return (
        f"{text}; more seeds would bring that {best}: the rest is the choice of held-out text (evaluation.sequences)."
    )


def share(value: float, base: float | None) -> str:
    """In brackets, as per cent of the baseline's loss."""
    return f" ({100 * abs(value) / base:.2g} %)" if base else ""


def between(found: Verdict) -> str:
    if found.low is None or found.high is None:
        return "not known"
    return f"{wording.signed(found.low)} to {wording.signed(found.high)}"


def parts(found: Verdict) -> str:
    """The two halves that add as squares; nothing where one of them is all."""
    if found.seeds_half is None or found.text_half is None:
        return ""
    return f" (seeds ± {found.seeds_half:.4f}, text ± {found.text_half:.4f})"


def remarks(comparison: Comparison) -> list[str]:
    """What has to be known of the runs that the differences are of; each once."""
    untaught = [f"{NEVER_BETTER}: {line.untaught}" for line in comparison.lines if line.untaught]
    return list(dict.fromkeys(untaught + [told for line in comparison.lines for told in line.remarks]))


def alarms(comparison: Comparison) -> list[str]:
    """Alarms of each variant, those that were on at the end first; then routers that follow a fixed rule."""
    found = routers.told(comparison.alarms, {line.name: line.runs for line in comparison.lines})
    return [f"alarm: {line}" for line in found] + comparison.fixed_routers


def multipliers(comparison: Comparison) -> list[str]:
    """How many times the baseline needs for the same loss, on each axis."""
    told = []
    for line in comparison.lines:
        known = [
            f"{one.factor:.2f} × the {AXIS_NAMES[one.axis]}" + (f" [{one.low:.2f}, {one.high:.2f}]" if one.low else "")
            for one in line.multipliers
        ]
        if known:
            told.append(f"For the loss of {line.name}, {comparison.baseline} needs {', '.join(known)}.")
    if told:
        told.append(
            "These are read where both curves reached the higher of the two last losses. The run that ended lower had "
            "not brought its learning rate down there, so they favour the other"
            + ("; with one seed they say nothing of another seed." if _one_seed(comparison) else ".")
        )
    return told


def _one_seed(comparison: Comparison) -> bool:
    return any(one.pairs == 1 for line in comparison.lines for one in line.multipliers)


def what_intervals_cover(comparison: Comparison) -> list[str]:
    """The sentences that keep a reader from concluding too much."""
    found = [line.difference for line in comparison.lines if line.difference and line.difference.low is not None]
    told = []
    for verdict in {one.method: one for one in found}.values():
        text = f"Interval: {verdict.method}; it covers {verdict.covers}."
        if "seeds" not in verdict.covers:
            text += (
                " Training the same recipe again would move the result too: train each with three or more values of "
                "seed and give all the runs to `moelab compare`, which groups them."
            )
        told.append(text)
    if any(one.apart for line in comparison.lines for one in (line.difference, *line.at_equal.values()) if one):
        told.append(
            f"{wording.APART} the word is Holm's, and the interval beside it says otherwise. Words go by steps: the "
            "clearest difference must be the surest, each one after it less so. The intervals hold for all "
            f"comparisons at once and are all as sure. In at most {100 * comparison.rules.error:g} % of such reports "
            "is any word false, and in as many does any interval miss."
        )
    if any(one.verdict == words.NEGLIGIBLE for one in found):
        told.append(f"Negligible: less than {100 * comparison.rules.practical:g} % of the loss (--practical).")
    if any(one.verdict == words.CUT_SHORT for line in comparison.lines for one in line.at_equal.values()):
        told.append(
            "Cut short: the higher run went on after that point, its learning rate had not come down there; a run of "
            "that length would have ended lower, so the difference is no verdict."
        )
    return told
