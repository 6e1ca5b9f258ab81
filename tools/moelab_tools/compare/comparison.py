"""Puts the numbers of all runs together: what the table, the report and comparison.json show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moelab.errors import UserError
from moelab.paths import user_path
from moelab_tools.compare.budgets import Budget, equal_budgets, flops_warnings
from moelab_tools.compare.differences import Table, check_comparable, config_differences, facts, fairness_warnings
from moelab_tools.compare.held_out import choose_measure, seen_before
from moelab_tools.compare.runs import Run
from moelab_tools.compare.statistics import BITS_PER_BYTE, Interval, Measure
from moelab_tools.compare.variants import Variant, difference, group_by_seed, loss_of, recipe, score

FORMAT_VERSION = 2  # of comparison.json
LAST_PART = 0.25  # of the logged steps: over which throughput and balance are averaged
ROUGH_BELOW = 20  # documents: an interval from fewer is rough
DISAGREEMENT = 0.01  # relative, between the logged loss and that of the documents


@dataclass(frozen=True)
class Line:
    """One variant in the table."""

    name: str
    runs: list[str]
    seeds: list[int | str | None]
    status: str
    components: dict[str, str]
    parameters_total: float | None
    parameters_active: float | None  # as the routers declare
    parameters_active_served: float | None  # that a token passed through, on average; None: not counted
    tokens: float
    flops: float | None  # served; None: not counted
    at_equal_tokens: float | None  # loss in the comparison's measure; None: no evaluation on both sides of that point
    at_equal_flops: float | None
    seconds: float
    eval_loss: float | None
    perplexity: float | None
    score: float | None  # held-out loss in the comparison's measure
    score_sd: float | None  # over training seeds; None for a single run
    difference: Interval | None  # to the baseline
    verdict: str  # best, baseline, better, worse, not resolved, no interval, or the status of an unfinished run
    tokens_per_second: float | None
    max_violation: float | None
    dead_fraction: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that is known about these runs together."""

    runs: list[Run]  # in the order of the lines
    lines: list[Line]  # best first, unfinished ones last
    measure: Measure
    baseline: str | None  # the variant that differences are taken to
    baseline_is_best: bool  # it was not asked for by name
    conflicts: list[str]  # why the losses can't be compared, when the user insisted
    seen: list[str]  # which runs score text that their starting weights had met, or may have
    warnings: list[str]
    budgets: list[Budget]
    domains: dict[str, dict[str, float]]  # domain -> run -> held-out loss
    domain_documents: dict[str, int]
    config: Table
    facts: Table

    def to_json(self) -> dict[str, Any]:
        """All numbers, without the curves: those are in each run's metrics.jsonl."""
        return {
            "format_version": FORMAT_VERSION,
            "runs": {run.name: {"path": str(run.path), "status": run.status} for run in self.runs},
            "baseline": self.baseline,
            "not_comparable": self.conflicts,
            "held_out_text_seen": self.seen,
            "warnings": self.warnings,
            "variants": [asdict(line) for line in self.lines],
            "equal_budgets": [asdict(budget) for budget in self.budgets],
            "measure": self.measure.name,
            "score_by_domain": self.domains,
            "config_differences": {key: dict(zip(self.names, row, strict=True)) for key, row in self.config.items()},
            "facts": {key: dict(zip(self.names, row, strict=True)) for key, row in self.facts.items()},
        }

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]


def compare(runs: Sequence[Run], baseline: str | None = None, allow_different_data: bool = False) -> Comparison:
    """Raises UserError when the runs can't be compared, or when `baseline` names none of them."""
    conflicts = check_comparable(runs, allow_different_data)
    measure, runs, why = choose_measure(runs)
    variants = group_by_seed(runs)
    chosen = _named(variants, baseline) if baseline else _best(variants, measure)
    by_name = baseline is not None
    budgets = equal_budgets([run for run in runs if run.finished], measure)
    lines = [_line(variant, chosen, measure, budgets, by_name=by_name) for variant in variants]
    lines.sort(key=lambda line: (line.status != "finished", math.inf if line.score is None else line.score))
    by_name_of_run = {run.name: run for run in runs}
    runs = [by_name_of_run[name] for line in lines for name in line.runs]
    domains, domain_documents = _domains(runs, measure)
    warnings = why + fairness_warnings(runs) + flops_warnings(runs) + _orders(variants)
    warnings += _document_warnings(runs, measure, told=bool(why)) + _repeated(runs)
    return Comparison(
        runs=runs,
        lines=lines,
        measure=measure,
        baseline=chosen.name if chosen else None,
        baseline_is_best=baseline is None,
        conflicts=conflicts,
        seen=seen_before(runs),
        warnings=warnings,
        budgets=budgets,
        domains=domains,
        domain_documents=domain_documents,
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


def _best(variants: Sequence[Variant], measure: Measure) -> Variant | None:
    """The lowest held-out loss among those that finished."""
    finished = [(index, variant.scores(measure)) for index, variant in enumerate(variants) if variant.finished]
    scored = [(float(np.mean(scores)), index) for index, scores in finished if scores]
    return variants[min(scored)[1]] if scored else None


def _line(
    variant: Variant, baseline: Variant | None, measure: Measure, budgets: Sequence[Budget], *, by_name: bool
) -> Line:
    first, values = variant.runs[0], variant.scores(measure)
    gap = difference(variant, baseline, measure) if baseline is not None and baseline is not variant else None
    parameters = first.summary.get("parameters", {})
    return Line(
        name=variant.name,
        runs=[run.name for run in variant.runs],
        seeds=variant.seeds,
        status=" and ".join(dict.fromkeys(run.status for run in variant.runs)),
        components=describe_components(first.summary.get("components") or first.config["model"].get("moe") or {}),
        parameters_total=parameters.get("total"),
        parameters_active=parameters.get("active"),
        parameters_active_served=_mean([run.active_served for run in variant.runs]),
        tokens=float(np.mean([run.amount("tokens") for run in variant.runs])),
        flops=_mean([run.amount("flops") if run.counts_flops else None for run in variant.runs]),
        at_equal_tokens=_at_budget(variant, budgets, "tokens"),
        at_equal_flops=_at_budget(variant, budgets, "flops"),
        seconds=float(np.mean([run.amount("seconds") for run in variant.runs])),
        eval_loss=variant.mean("eval/loss"),
        perplexity=variant.mean("eval/perplexity"),
        score=float(np.mean(values)) if values else None,
        score_sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        difference=gap,
        verdict=_verdict(variant, baseline, gap, by_name),
        tokens_per_second=_recent(variant, "perf/tokens_per_second"),
        max_violation=_recent(variant, "moe/mean/max_violation"),
        dead_fraction=_recent(variant, "moe/mean/dead_fraction"),
    )


def _verdict(variant: Variant, baseline: Variant | None, gap: Interval | None, by_name: bool) -> str:
    if not variant.finished:
        return next(run.status for run in variant.runs if not run.finished)
    if variant is baseline:
        return "baseline" if by_name else "best"
    return gap.verdict if gap else "no interval"


def _at_budget(variant: Variant, budgets: Sequence[Budget], axis: str) -> float | None:
    """Mean over the variant's runs; None where one of them has no loss there."""
    losses = next((budget.losses for budget in budgets if budget.axis == axis), {})
    return _mean([losses.get(run.name) for run in variant.runs])


def _mean(values: Sequence[float | None]) -> float | None:
    """None as soon as one is not known: a mean of the others would be of another set."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _recent(variant: Variant, tag: str) -> float | None:
    """Mean over the last part of the logged steps, and over the variant's runs."""
    means = []
    for run in variant.runs:
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


def _orders(variants: Sequence[Variant]) -> list[str]:
    """Runs of other seeds read in another order, which pairs of equal seeds don't."""
    orders = {variant.name: ", ".join(sorted(str(run.order_seed) for run in variant.runs)) for variant in variants}
    if len(set(orders.values())) < 2:
        return []
    listing = "; ".join(f"{name} {order}" for name, order in orders.items())
    return [f"The variants read the data in different orders (data.order_seed, or seed): {listing}"]


def _document_warnings(runs: Sequence[Run], measure: Measure, *, told: bool) -> list[str]:
    counts = [len(run.documents) for run in runs if run.documents]
    warnings = []
    if counts and min(counts) < ROUGH_BELOW:
        warnings.append(
            f"Only {min(counts)} held-out documents: intervals over documents are rough (raise evaluation.sequences)"
        )
    tag = "eval/bits_per_byte" if measure is BITS_PER_BYTE else "eval/loss"
    for run in () if told else runs:
        logged, found = run.final(tag), score(run, measure)
        if logged and found and abs(found / logged - 1) > DISAGREEMENT:
            warnings.append(
                f"{run.name}: its documents give {found:.4f} {measure.name}, its log says {logged:.4f}; "
                "the comparison uses the documents"
            )
    return warnings


def _repeated(runs: Sequence[Run]) -> list[str]:
    """Runs of one config and one seed: a repetition, not a second sample."""
    seen: dict[str, str] = {}
    warnings = []
    for run in runs:
        key = recipe(run) + str(run.replicate)
        if key in seen:
            warnings.append(f"{run.name} repeats {seen[key]}: same config, same seed")
        seen.setdefault(key, run.name)
    return warnings
