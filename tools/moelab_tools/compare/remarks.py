"""What a reader must know of the runs before believing their numbers, beside what makes them unfair to compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moelab_tools.compare.differences import some
from moelab_tools.compare.measure import Measure
from moelab_tools.compare.runs import Run
from moelab_tools.compare.variants import Variant, recipe, score

ROUGH_BELOW = 20  # documents: an interval from fewer is rough
DISAGREEMENT = 0.01  # relative, between the logged loss and that of the documents
LAST_QUARTER, STEEP = 0.75, 0.05  # of the tokens; a loss that falls by more than this part in it is still falling
FEWEST = 8  # logged steps: fewer show no trend
AROUND = 0.05  # of the tokens: over which a training loss is averaged, on either side of a point


def orders(variants: Sequence[Variant]) -> list[str]:
    """Runs of other seeds read in another order, which pairs of equal seeds don't: here there is no order in common."""
    found = {variant.name: {str(run.order_seed) for run in variant.runs} for variant in variants}
    if len(found) < 2 or set.intersection(*found.values()):
        return []
    listing = "; ".join(f"{name} {', '.join(sorted(order))}" for name, order in found.items())
    return [f"The variants read the data in different orders (data.order_seed, or seed): {listing}"]


def documents(runs: Sequence[Run], measure: Measure, *, told: bool) -> list[str]:
    """Too few of them, and logs that say otherwise; `told`: why they may was said already."""
    counts = [len(run.documents) for run in runs if run.documents]
    warnings = []
    if counts and min(counts) < ROUGH_BELOW:
        warnings.append(
            f"Only {min(counts)} held-out documents: intervals over documents are rough (raise evaluation.sequences)"
        )
    for run in () if told else runs:
        logged, found = run.final(measure.tag), score(run, measure)
        if logged and found and abs(found / logged - 1) > DISAGREEMENT:
            warnings.append(
                f"{run.name}: its documents give {found:.4f} {measure.name}, its log says {logged:.4f}; "
                "the comparison uses the documents"
            )
    return warnings


def repeated(runs: Sequence[Run]) -> list[str]:
    """Runs of one config and one seed: a repetition, not a second sample."""
    seen: dict[str, str] = {}
    warnings = []
    for run in runs:
        key = f"{recipe(run)} {run.replicate!r}"
        if key in seen:
            warnings.append(f"{run.name} repeats {seen[key]}: same config, same seed")
        seen.setdefault(key, run.name)
    return warnings


def steep(runs: Sequence[Run]) -> list[str]:
    """Runs that were stopped while the loss was falling fast: there another seed moves it by several per cent."""
    found = {run.name: fall for run in runs if run.finished and (fall := _last_fall(run)) > STEEP}
    if not found:
        return []
    listing = some([f"{name} by {fall:.0%}" for name, fall in sorted(found.items(), key=lambda one: -one[1])])
    return [
        f"The loss was still falling fast in the last quarter of the tokens ({listing}): seeds differ by several per "
        "cent there, so few can be told apart; train longer"
    ]


def noncausal(runs: Sequence[Run]) -> list[str]:
    """Runs with layers that look at later tokens, which generation has none of: what their losses are worth."""
    found: dict[str, list[str]] = {"evaluation": [], "training": []}
    for run in runs:
        modes = run.summary.get("noncausal") or {}
        for mode, names in found.items():
            if modes.get(mode):
                names.append(run.name)
                break  # in evaluation: that it does in training too says nothing more
    told = []
    if found["evaluation"]:
        told.append(
            f"{', '.join(found['evaluation'])}: looks at later tokens in evaluation: its held-out loss is not "
            "comparable with that of a causal model, and it would not reach it when it generates"
        )
    if found["training"]:
        told.append(
            f"{', '.join(found['training'])}: looks at later tokens in training: its training loss is not comparable "
            "with that of a causal model; its held-out loss is that of what stands in for it in evaluation"
        )
    return told


def sources(variants: Sequence[Variant]) -> list[str]:
    """Dense sources among the seeds of a variant: who reads its name must know."""
    named: dict[tuple[str, ...], list[str]] = {}
    for variant in variants:
        found = tuple(sorted({run.replicate.source or "" for run in variant.runs} - {""}))
        if len(found) > 1:
            named.setdefault(found, []).append(variant.name)
    return [
        f"{', '.join(names)}: {len(found)} dense sources of one recipe ({found[0]}; ... {found[-1]}) count as "
        f"{'its' if len(names) == 1 else 'their'} seeds"
        for found, names in named.items()
    ]


def _last_fall(run: Run) -> float:
    """By what part of itself the training loss fell in the last quarter."""
    x, y = run.curve("train/lm_loss")
    if not x:
        x, y = run.curve("train/loss")
    if len(x) < FEWEST:
        return 0.0
    tokens, losses = np.array(x), np.array(y)
    before = losses[np.abs(tokens / tokens[-1] - LAST_QUARTER) <= AROUND]
    after = losses[tokens >= (1 - AROUND) * tokens[-1]]
    return float(1 - after.mean() / before.mean()) if len(before) else 0.0
