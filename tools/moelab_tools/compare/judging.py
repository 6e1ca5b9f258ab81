"""From runs to verdicts: which of them count, on which documents, at the end and at equal tokens, FLOPs and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from moelab_tools.compare.budgets import AXES, Budget
from moelab_tools.compare.measure import Measure
from moelab_tools.compare.multipliers import Curve, Multiplier, multiplier
from moelab_tools.compare.pairing import Key, Losses, Matched, at_budget
from moelab_tools.compare.routers import NEVER_BETTER
from moelab_tools.compare.runs import Replicate, Run
from moelab_tools.compare.variants import Variant
from moelab_tools.compare.verdict import BETTER, CUT_SHORT, LIKELY, WITHHELD, WORSE, Rules, Verdict, decide, match_all

Units = dict[Key, list[Run]]  # what counts as one sample of a variant: mostly one run


@dataclass(frozen=True)
class DomainDifference:
    """One variant against the baseline on one domain's documents. No word goes with it: see `domain_differences`."""

    difference: float
    low: float | None  # the interval, at the level of a verdict at the end of the run; None for a single document
    high: float | None
    documents: int


@dataclass(frozen=True)
class Judged:
    """By variant; the baseline is in none."""

    final: dict[str, Verdict] = field(default_factory=dict)
    at_equal: dict[str, dict[str, Verdict]] = field(default_factory=dict)  # axis -> variant
    multipliers: dict[str, list[Multiplier]] = field(default_factory=dict)


def judge_variants(
    variants: Sequence[Variant],
    baseline: Variant | None,
    measure: Measure,
    budgets: Sequence[Budget],
    rules: Rules,
    untaught: Mapping[str, str] | None = None,
) -> Judged:
    """The variants that finished against `baseline`; nothing where that did not finish.

    `untaught`: {variant: why its router has learnt nothing}; no word says that one of these is better.
    """
    known = [one for one in variants if any(run.documents for run in one.counted)]
    if baseline is None or baseline not in known or len(known) < 2:
        return Judged()
    units = samples(known)
    losses = shared_losses(units, measure)
    if not losses:
        return Judged()
    matched, remarks = match_all(losses, baseline.name)
    loss = abs(losses[baseline.name].score)
    final = decide(matched, loss, rules)
    final = {
        name: replace(verdict, remarks=(*_failed(known, (name, baseline.name)), *remarks[name], *verdict.remarks))
        for name, verdict in final.items()
    }
    at_equal = {budget.axis: _at_equal(matched, units, baseline.name, budget, loss, rules) for budget in budgets}
    factors = {
        name: _multipliers(one, units[name], units[baseline.name], measure, final[name])
        for name, one in matched.items()
    }
    withhold = partial(_withhold, baseline=baseline.name, untaught=untaught or {})
    return Judged(
        {name: withhold(one, name) for name, one in final.items()},
        {axis: {name: withhold(one, name) for name, one in found.items()} for axis, found in at_equal.items()},
        factors,
    )


def domain_differences(
    variants: Sequence[Variant], baseline: Variant | None, measure: Measure, rules: Rules
) -> dict[str, dict[str, DomainDifference]]:
    """{domain: {variant: its difference}}, where there is one.

    The intervals hold together over the variants, as those of the headline do, and not over the domains: with five of
    them one in four comparisons has one that is off. So they show where a difference comes from, and are no verdicts.
    """
    known = [one for one in variants if any(run.documents for run in one.counted)]
    if baseline is None or baseline not in known or len(known) < 2:
        return {}
    units, found = samples(known), {}
    domains = {one.domain for variant in known for run in variant.counted for one in run.documents.values()}
    for domain in sorted(domains):
        losses = shared_losses(units, measure, domain)
        if not losses:
            continue
        matched, _ = match_all(losses, baseline.name)
        verdicts = decide(matched, abs(losses[baseline.name].score), replace(rules, plan=None))
        count = len(losses[baseline.name].size)
        found[domain] = {
            name: DomainDifference(one.difference, *((one.low, one.high) if count > 1 else (None, None)), count)
            for name, one in verdicts.items()
            if one.difference is not None
        }
    return found


def _withhold(verdict: Verdict, name: str, *, baseline: str, untaught: Mapping[str, str]) -> Verdict:
    """Numbers stay; a word that says the untaught side is the better one goes. The reason is a remark either way."""
    praised = {BETTER: name, LIKELY[BETTER]: name, WORSE: baseline, LIKELY[WORSE]: baseline}.get(verdict.verdict)
    told = tuple(f"{NEVER_BETTER}: {untaught[side]}" for side in (name, baseline) if side in untaught)
    word = WITHHELD if praised in untaught else verdict.verdict
    return replace(verdict, verdict=word, remarks=(*told, *verdict.remarks))


def samples(variants: Sequence[Variant]) -> dict[str, Units]:
    """What counts as one sample of each variant, under keys that are equal where two variants make a pair.

    Seeds of a conversion or of a dense source count for pairs where all runs have them: the dense model that is trained
    on beside its upcycled copies has no conversion, and yet is their pair. Where every variant was made from several
    dense sources, its runs are averaged within each: runs of one source are not independent.
    """
    runs = {one.name: [run for run in one.counted if run.documents] for one in variants}
    keys = {run.name: run.replicate for group in runs.values() for run in group}
    if all(len({keys[run.name].source for run in group} - {None}) > 1 for group in runs.values()):
        repeated = any(len({keys[run.name].source for run in group}) < len(group) for group in runs.values())
        if repeated:
            return {
                name: _grouped((f"source {keys[run.name].source}", run) for run in group)
                for name, group in runs.items()
            }
    for part in ("conversion", "source"):
        if any(getattr(key, part) is None for key in keys.values()):
            fewer = {name: key.without(part) for name, key in keys.items()}
            if all(len({fewer[run.name] for run in group}) == len(group) for group in runs.values()):
                keys = fewer
    return {name: _grouped((keys[run.name], run) for run in group) for name, group in runs.items()}


def _grouped(runs: Iterable[tuple[Replicate | str, Run]]) -> Units:
    units: Units = {}
    for key, run in runs:
        units.setdefault(key, []).append(run)
    return units


def shared_losses(units: Mapping[str, Units], measure: Measure, domain: str | None = None) -> dict[str, Losses]:
    """On the documents that all runs share, of one domain if it is named; none where they share no text."""
    runs = [run for one in units.values() for group in one.values() for run in group]
    names = sorted(set.intersection(*(set(run.documents) for run in runs)))
    if domain is not None:
        names = [name for name in names if runs[0].documents[name].domain == domain]
    size = np.array([getattr(runs[0].documents[name], measure.per) or 0 for name in names], dtype=np.float64)
    if not size.sum() > 0:
        return {}
    return {
        name: Losses(
            tuple(one),
            np.array([
                np.mean([[run.documents[document].nats for document in names] for run in group], axis=0)
                for group in one.values()
            ]) * measure.per_nat,
            size,
        )
        for name, one in units.items()
    }  # fmt: skip


def _at_equal(
    matched: Mapping[str, Matched], units: Mapping[str, Units], baseline: str, budget: Budget, loss: float, rules: Rules
) -> dict[str, Verdict]:
    """No word for a difference that a schedule explains: the higher run was read before its learning rate came down."""
    reached = {name: _reached(one, budget) for name, one in units.items()}
    known = {
        name: there
        for name, one in matched.items()
        if (there := at_budget(one, reached[name], reached[baseline])) is not None
    }
    short = {
        name: any(run.name in budget.cut_short for group in one.values() for run in group)
        for name, one in units.items()
    }
    verdicts = {}
    for name, verdict in decide(known, loss, rules).items():
        higher = {WORSE: name, LIKELY[WORSE]: name, BETTER: baseline, LIKELY[BETTER]: baseline}.get(verdict.verdict)
        verdicts[name] = replace(verdict, verdict=CUT_SHORT) if higher and short[higher] else verdict
    return verdicts


def _reached(units: Units, budget: Budget) -> dict[Key, float]:
    """The loss of each sample there, if all of its runs have one."""
    return {
        key: float(np.mean([budget.losses[run.name] for run in group]))
        for key, group in units.items()
        if all(run.name in budget.losses for run in group)
    }


def _multipliers(
    matched: Matched, variant: Units, baseline: Units, measure: Measure, verdict: Verdict
) -> list[Multiplier]:
    """On every axis that both counted; only for pairs of single runs, since several share no curve."""
    pairs = [(variant[mine], baseline[theirs]) for mine, theirs in matched.pairs]
    if not pairs or matched.contrast is None or any(len(group) > 1 for pair in pairs for group in pair):
        return []
    found = []
    for axis in AXES:
        if axis == "flops" and not all(group[0].counts_flops for pair in pairs for group in pair):
            continue
        curves = [tuple(Curve.of(*group[0].curve(measure.tag, axis)) for group in pair) for pair in pairs]
        contrast = matched.contrast
        one = multiplier(
            axis, [(a, b) for a, b in curves], float(contrast.text_error), contrast.text_freedom, verdict.level
        )
        found += [one] if one is not None else []
    return found


def _failed(variants: Sequence[Variant], names: Sequence[str]) -> list[str]:
    """A seed that did not finish is part of what the recipe does."""
    told = []
    for variant in variants:
        if variant.name in names and (lost := [run for run in variant.runs if not run.finished]):
            listing = ", ".join(f"{run.name} {run.status}" for run in lost)
            told.append(
                f"{variant.name}: {len(lost)} of {len(variant.runs)} runs did not finish ({listing}); its figures are "
                "those of the others, and failing is part of what the recipe does"
            )
    return told
