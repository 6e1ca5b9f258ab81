"""Runs that differ only in `seed` or the order of reading are one variant, trained several times."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.differences import flatten, is_bookkeeping
from moelab_tools.compare.runs import Document, Run
from moelab_tools.compare.statistics import (
    BITS_PER_BYTE,
    Floats,
    Interval,
    Measure,
    over_documents,
    over_seeds,
)

FEW_DOCUMENTS = 2  # fewer have no spread to resample


@dataclass(frozen=True)
class Variant:
    """One recipe: one run, or several that share all but their seed."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs)

    @property
    def seeds(self) -> list[int | str | None]:
        """Of each run; with the order of reading where that does not follow."""
        return [run.seed if run.order_seed == run.seed else f"{run.seed} (order {run.order_seed})" for run in self.runs]

    def scores(self, measure: Measure) -> list[float]:
        """Held-out loss of each run that knows it."""
        return [value for run in self.runs if (value := score(run, measure)) is not None]

    def mean(self, tag: str) -> float | None:
        """Of the final values of its runs."""
        values = [value for run in self.runs if (value := run.final(tag)) is not None]
        return float(np.mean(values)) if values else None


def group_by_seed(runs: Sequence[Run]) -> list[Variant]:
    """In the order of their first runs. Two runs of the same config and seed stay apart: they are one sample."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        text, copy = recipe(run), 0
        while run.replicate in [other.replicate for other in groups.get((text, copy), [])]:
            copy += 1
        groups.setdefault((text, copy), []).append(run)
    names = [_common_name(group) for group in groups.values()]
    return [
        Variant(name if names.count(name) == 1 else group[0].name, tuple(group))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def difference(variant: Variant, baseline: Variant, measure: Measure) -> Interval | None:
    """Over seeds where both have several, else over documents; None where there is nothing to resample."""
    if not all(run.documents for run in (*variant.runs, *baseline.runs)):
        return None
    if len(variant.runs) > 1 and len(baseline.runs) > 1:
        paired = sorted(run.replicate for run in variant.runs) == sorted(run.replicate for run in baseline.runs)
        return over_seeds(_in_seed_order(variant, measure), _in_seed_order(baseline, measure), paired)
    shared = sorted(set.intersection(*(set(run.documents) for run in (*variant.runs, *baseline.runs))))
    if len(shared) < FEW_DOCUMENTS:
        return None
    size = np.array([getattr(variant.runs[0].documents[name], measure.per) for name in shared], dtype=np.float64)
    return over_documents(_losses(variant, shared, measure), _losses(baseline, shared, measure), size)


def score(run: Run, measure: Measure) -> float | None:
    """Held-out loss over all documents of the final evaluation, else what was logged last."""
    if run.documents:
        return loss_of(list(run.documents.values()), measure)
    return run.final("eval/bits_per_byte" if measure is BITS_PER_BYTE else "eval/loss")


def loss_of(documents: Sequence[Document], measure: Measure) -> float:
    """Of all documents together, so that a long one counts more."""
    size = sum(getattr(document, measure.per) for document in documents)
    return measure.per_nat * sum(document.nats for document in documents) / size


def _in_seed_order(variant: Variant, measure: Measure) -> list[float]:
    ordered = Variant(variant.name, tuple(sorted(variant.runs, key=lambda run: run.replicate)))
    return ordered.scores(measure)


def _losses(variant: Variant, names: Sequence[str], measure: Measure) -> Floats:
    """[N]: each document's nats in the measure's unit, averaged over the variant's runs."""
    nats = [[run.documents[name].nats for name in names] for run in variant.runs]
    return np.mean(nats, axis=0) * measure.per_nat


def recipe(run: Run) -> str:
    """The config without its seeds and without what changes nothing of the result, as one text."""
    seeds = ("seed", "data.order_seed")
    keys = {key: value for key, value in flatten(run.config) if key not in seeds and not is_bookkeeping(key)}
    return json.dumps(keys, sort_keys=True, default=str)


def _common_name(runs: Sequence[Run]) -> str:
    """`moe_seed0`, `moe_seed1` -> `moe`; the first run's name where they share nothing."""
    if len(runs) == 1:
        return runs[0].name
    names = {re.sub(r"[-_./ ]*(seed|s)?[-_ ]*\d+$", "", run.name) for run in runs}
    return names.pop() if len(names) == 1 and names != {""} else runs[0].name
