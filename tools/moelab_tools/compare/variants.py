"""Runs that differ only in seeds are one variant, trained several times: of weights, order, source, conversion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab.config.interpolation import replace_leaves
from moelab.training.format import NAMED_WEIGHTS
from moelab_tools.compare.differences import flatten, is_bookkeeping
from moelab_tools.compare.endings import rewarmed
from moelab_tools.compare.measure import Measure
from moelab_tools.compare.runs import Document, Run

SEEDS = ("seed", "data.order_seed")  # of a config


@dataclass(frozen=True)
class Variant:
    """One recipe: one run, or several that share all but their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> bool:
        """Whether any of its runs did: those count, and the others are told."""
        return any(run.finished for run in self.runs)

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that its figures are of: the finished ones, else all."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def seeds(self) -> list[int | str | None]:
        """Of each run; in words where it has more than one."""
        return [run.seed if str(run.replicate) == str(run.seed) else str(run.replicate) for run in self.runs]

    def scores(self, measure: Measure) -> list[float]:
        """Held-out loss of each counted run that knows it."""
        return [value for run in self.counted if (value := score(run, measure)) is not None]

    def mean(self, tag: str) -> float | None:
        """Of the final values of its counted runs."""
        values = [value for run in self.counted if (value := run.final(tag)) is not None]
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


def score(run: Run, measure: Measure) -> float | None:
    """Held-out loss over all documents of the final evaluation, else what was logged last."""
    if run.documents:
        return loss_of(list(run.documents.values()), measure)
    return run.final(measure.tag)


def loss_of(documents: Sequence[Document], measure: Measure) -> float:
    """Of all documents together, so that a long one counts more."""
    size = sum(getattr(document, measure.per) for document in documents)
    return measure.per_nat * sum(document.nats for document in documents) / size


def recipe(run: Run) -> str:
    """The config without its seeds and without what changes nothing of the result, as one text.

    Weights that a run starts from, or reads, stand for how they were made (`moelab.data.lineage`), not for where
    they lie.
    """
    named = run.summary.get(NAMED_WEIGHTS, {}).get("recipes", {})
    config = replace_leaves(run.config, {tuple(key.split(".")): value for key, value in named.items()})
    keys = {key: value for key, value in flatten(config) if key not in SEEDS and not is_bookkeeping(key)}
    start = (run.summary.get("lineage") or {}).get("recipe")
    if start is not None:
        keys["train.init_from"] = start
    if rewarmed(run):
        keys["rewarmed"] = rewarmed(run)
    return json.dumps(keys, sort_keys=True, default=str)


def _common_name(runs: Sequence[Run]) -> str:
    """`moe_seed0`, `moe_seed1` -> `moe`; the first run's name where they share nothing."""
    if len(runs) == 1:
        return runs[0].name
    names = {re.sub(r"[-_./ ]*(seed|s)?[-_ ]*\d+$", "", run.name) for run in runs}
    return names.pop() if len(names) == 1 and names != {""} else runs[0].name
