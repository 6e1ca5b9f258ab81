"""Puts the numbers of all runs together: what the table, the report and comparison.json show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moelab.errors import UserError
from moelab.paths import user_path
from moelab_tools.compare import remarks, routers
from moelab_tools.compare.budgets import Budget, equal_budgets, flops_warnings
from moelab_tools.compare.contrast import LEVEL
from moelab_tools.compare.differences import Table, check_comparable, config_differences, facts, fairness_warnings
from moelab_tools.compare.endings import endings
from moelab_tools.compare.held_out import choose_measure, seen_before
from moelab_tools.compare.judging import DomainDifference, Judged, domain_differences, judge_variants
from moelab_tools.compare.measure import Measure
from moelab_tools.compare.multipliers import Multiplier
from moelab_tools.compare.pairing import LEAST_PAIRS
from moelab_tools.compare.plugin_defaults import fill_in
from moelab_tools.compare.routers import RunAlarm
from moelab_tools.compare.runs import Run
from moelab_tools.compare.sequential import Plan
from moelab_tools.compare.variants import Variant, group_by_seed, loss_of
from moelab_tools.compare.verdict import BEST, LOWEST, PRACTICAL, WITHHELD, WORSE, Rules, Verdict

FORMAT_VERSION = 4  # of comparison.json
LAST_PART = 0.25  # of the logged steps: over which throughput and balance are averaged


@dataclass(frozen=True)
class Line:
    """One variant in the table."""

    name: str
    runs: list[str]
    seeds: list[int | str | None]
    counted: int  # runs that its figures are of: those that finished, if any did
    status: str
    components: dict[str, str]
    parameters_total: float | None
    parameters_active: float | None  # as the routers declare
    parameters_active_served: float | None  # that a token passed through, on average; None: not counted
    tokens: float
    flops: float | None  # served; None: not counted
    at_equal_tokens: float | None  # loss in the comparison's measure; None: no evaluation on both sides of that point
    at_equal_flops: float | None
    at_equal_seconds: float | None
    seconds: float
    eval_loss: float | None
    perplexity: float | None
    score: float | None  # held-out loss in the comparison's measure
    score_sd: float | None  # over training seeds; None for a single run
    untaught: str | None  # why its router has learnt nothing, so that no word ranks it; None: nothing speaks for that
    frozen: str | None  # what each of its words is said with, where its config keeps the router as it is
    verdict: str  # a word of `verdict`, baseline, best, lowest, or the status of a variant of which no run finished
    difference: Verdict | None  # to the baseline, at the end of each run
    at_equal: dict[str, Verdict]  # to the baseline, by axis: tokens, flops, seconds
    multipliers: list[Multiplier]  # how many times that the baseline needs for the same loss
    remarks: list[str]  # what has to be known of its runs
    tokens_per_second: float | None
    max_violation: float | None
    dead_fraction: float | None

    @property
    def qualified(self) -> str:
        """Its name as words are said of it."""
        return f"{self.name} ({self.frozen})" if self.frozen else self.name


@dataclass(frozen=True)
class Comparison:
    """Everything that is known about these runs together."""

    runs: list[Run]  # in the order of the lines
    lines: list[Line]  # best first, unfinished ones last
    measure: Measure
    baseline: str | None  # the variant that differences are taken to
    rules: Rules
    conflicts: list[str]  # why the losses can't be compared, when the user insisted
    alarms: list[RunAlarm]  # of all runs, in their order
    fixed_routers: list[str]  # which variants route by a fixed rule, by design
    seen: list[str]  # which runs score text that their starting weights had met, or may have
    warnings: list[str]
    budgets: list[Budget]
    domains: dict[str, dict[str, float]]  # domain -> run -> held-out loss
    domain_documents: dict[str, int]
    differences_by_domain: dict[str, dict[str, DomainDifference]]  # domain -> variant
    config: Table
    facts: Table

    def to_json(self) -> dict[str, Any]:
        """All numbers, without the curves: those are in each run's metrics.jsonl."""
        return {
            "format_version": FORMAT_VERSION,
            "runs": {
                run.name: {
                    "path": str(run.path),
                    "status": run.status,
                    "alarms": [asdict(alarm) for alarm in self.alarms if alarm.run == run.name],
                }
                for run in self.runs
            },
            "fixed_routers": self.fixed_routers,
            "baseline": self.baseline,
            "rules": asdict(self.rules),
            "not_comparable": self.conflicts,
            "held_out_text_seen": self.seen,
            "warnings": self.warnings,
            "variants": [asdict(line) for line in self.lines],
            "equal_budgets": [asdict(budget) for budget in self.budgets],
            "measure": self.measure.name,
            "score_by_domain": self.domains,
            "differences_by_domain": {
                domain: {name: asdict(one) for name, one in found.items()}
                for domain, found in self.differences_by_domain.items()
            },
            "config_differences": {key: dict(zip(self.names, row, strict=True)) for key, row in self.config.items()},
            "facts": {key: dict(zip(self.names, row, strict=True)) for key, row in self.facts.items()},
        }

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]


def compare(
    runs: Sequence[Run],
    baseline: str | None = None,
    allow_different_data: bool = False,
    *,
    practical: float = PRACTICAL,
    screening: bool = False,
    error: float = LEVEL,
    plan: Plan | None = None,
) -> Comparison:
    """`error`: how often a word may be false. `plan`: this is a look at seeds before all are in (`sequential`).

    Raises UserError when the runs can't be compared, or when `baseline` names none of them.
    """
    assert plan is None or (baseline is not None and not screening), "looks are planned against a named baseline"
    fill_in(runs)
    rules = Rules(baseline is not None, practical, screening, error, plan)
    conflicts = check_comparable(runs, allow_different_data)
    measure, runs, why = choose_measure(runs)
    variants = group_by_seed(runs)
    untaught = routers.why_withheld(variants)
    chosen = _named(variants, baseline) if baseline else _lowest(variants, measure, untaught)
    budgets = equal_budgets([run for run in runs if run.finished], measure)
    judged = judge_variants(variants, chosen, measure, budgets, rules, untaught)
    lines = [_line(variant, measure, budgets, judged, untaught.get(variant.name)) for variant in variants]
    lines.sort(key=lambda line: (line.status != "finished", math.inf if line.score is None else line.score))
    lines = [replace(line, verdict=_word(line, lines, chosen, judged, rules)) for line in lines]
    by_name_of_run = {run.name: run for run in runs}
    runs = [by_name_of_run[name] for line in lines for name in line.runs]
    domains, domain_documents = _domains(runs, measure)
    warnings = why + endings(runs) + fairness_warnings(runs) + remarks.orders(variants) + remarks.sources(variants)
    warnings += remarks.documents(runs, measure, told=bool(why)) + flops_warnings(runs) + remarks.steep(runs)
    warnings += remarks.repeated(runs) + routers.unknown(runs) + remarks.noncausal(runs)
    return Comparison(
        runs=runs,
        lines=lines,
        measure=measure,
        baseline=chosen.name if chosen else None,
        rules=rules,
        conflicts=conflicts,
        alarms=[alarm for run in runs for alarm in routers.alarms_of(run)],
        fixed_routers=routers.by_design(variants),
        seen=seen_before(runs),
        warnings=warnings,
        budgets=budgets,
        domains=domains,
        domain_documents=domain_documents,
        differences_by_domain=domain_differences(variants, chosen, measure, rules),
        config=config_differences(runs),
        facts=facts(runs),
    )


def describe_components(components: Mapping[str, Any]) -> dict[str, str]:
    """{part: short text}; lists joined, parts that a dense model lacks left out."""
    return {key: text for key, value in components.items() if (text := _component(value))}


def _component(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name", ""))
    if isinstance(value, (list, tuple)):
        return " + ".join(_component(one) for one in value)
    return "" if value is None else str(value)


def _named(variants: Sequence[Variant], name: str) -> Variant:
    """By the variant's name, or the name or folder of one of its runs."""
    wanted = name.rstrip("/")
    for variant in variants:
        runs = variant.runs
        if wanted in (variant.name, *(run.name for run in runs), *(run.path.name for run in runs)):
            return variant
        if user_path(wanted).resolve() in [run.path.resolve() for run in runs]:
            return variant
    names = ", ".join(variant.name for variant in variants)
    raise UserError(f"--baseline {name}: is none of the runs compared; they are: {names}")


def _lowest(variants: Sequence[Variant], measure: Measure, untaught: Mapping[str, str]) -> Variant | None:
    """Of those that finished, the one with the lowest loss; of a router that learnt, with seeds enough, if any has."""
    finished = [variant for variant in variants if variant.finished]
    taught = [variant for variant in finished if variant.name not in untaught]
    scored = [(variant.scores(measure), variant) for variant in taught or finished]
    scored = [(scores, variant) for scores, variant in scored if scores]
    enough = [(scores, variant) for scores, variant in scored if len(scores) >= LEAST_PAIRS]
    return min(enough or scored, key=lambda one: np.mean(one[0]), default=(None, None))[1]


def _line(variant: Variant, measure: Measure, budgets: Sequence[Budget], judged: Judged, untaught: str | None) -> Line:
    first, values = variant.counted[0], variant.scores(measure)
    parameters = first.summary.get("parameters", {})
    verdict = judged.final.get(variant.name)
    return Line(
        name=variant.name,
        runs=[run.name for run in variant.runs],
        seeds=variant.seeds,
        counted=len(variant.counted),
        status=" and ".join(dict.fromkeys(run.status for run in variant.counted)),
        components=describe_components(first.summary.get("components") or first.config["model"].get("moe") or {}),
        parameters_total=parameters.get("total"),
        parameters_active=parameters.get("active"),
        parameters_active_served=_mean([run.active_served for run in variant.counted]),
        tokens=float(np.mean([run.amount("tokens") for run in variant.counted])),
        flops=_mean([run.amount("flops") if run.counts_flops else None for run in variant.counted]),
        at_equal_tokens=_at_budget(variant, budgets, "tokens"),
        at_equal_flops=_at_budget(variant, budgets, "flops"),
        at_equal_seconds=_at_budget(variant, budgets, "seconds"),
        seconds=float(np.mean([run.amount("seconds") for run in variant.counted])),
        eval_loss=variant.mean("eval/loss"),
        perplexity=variant.mean("eval/perplexity"),
        score=float(np.mean(values)) if values else None,
        score_sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        untaught=untaught,
        frozen=routers.frozen(variant),
        verdict=verdict.verdict if verdict else "",
        difference=verdict,
        at_equal={axis: found[variant.name] for axis, found in judged.at_equal.items() if variant.name in found},
        multipliers=judged.multipliers.get(variant.name, []),
        remarks=list(dict.fromkeys(verdict.remarks)) if verdict else [],
        tokens_per_second=_recent(variant, "perf/tokens_per_second"),
        max_violation=_recent(variant, "moe/mean/max_violation"),
        dead_fraction=_recent(variant, "moe/mean/dead_fraction"),
    )


def _word(line: Line, lines: Sequence[Line], baseline: Variant | None, judged: Judged, rules: Rules) -> str:
    """The baseline is best only where every other variant is worse, and none was left unjudged."""
    if line.status != "finished":
        return next(status for status in line.status.split(" and "))
    if baseline is None or line.name != baseline.name:
        return line.verdict or "no interval"
    if rules.named or line.untaught:
        return WITHHELD if line.untaught else "baseline"
    others = [one for one in lines if one.status == "finished" and one is not line]
    if others and all(one.verdict == WORSE for one in others):
        return BEST
    return LOWEST if line is lines[0] else "baseline"


def _at_budget(variant: Variant, budgets: Sequence[Budget], axis: str) -> float | None:
    """Mean over the variant's runs; None where one of them has no loss there."""
    losses = next((budget.losses for budget in budgets if budget.axis == axis), {})
    return _mean([losses.get(run.name) for run in variant.counted])


def _mean(values: Sequence[float | None]) -> float | None:
    """None as soon as one is not known: a mean of the others would be of another set."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _recent(variant: Variant, tag: str) -> float | None:
    """Mean over the last part of the logged steps, and over the variant's runs."""
    means = []
    for run in variant.counted:
        _, values = run.curve(tag)
        if values:
            means.append(np.mean(values[-max(1, round(len(values) * LAST_PART)) :]))
    return float(np.mean(means)) if means else None


def _domains(runs: Sequence[Run], measure: Measure) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """({domain: {run: held-out loss}}, {domain: number of held-out documents})."""
    table: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for run in runs:
        for domain in sorted({document.domain for document in run.documents.values()}):
            documents = [document for document in run.documents.values() if document.domain == domain]
            if sum(getattr(document, measure.per) for document in documents):
                table.setdefault(domain, {})[run.name] = loss_of(documents, measure)
            counts.setdefault(domain, len(documents))
    return table, counts
