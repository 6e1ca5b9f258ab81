"""Runs that differ only in `seed` are one variant, trained several times."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab_tools.compare.differences import flatten, is_bookkeeping
from moelab_tools.compare.runs import Run
from moelab_tools.compare.statistics import Floats, Interval, bits_per_byte, over_documents, over_seeds

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
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    def bits_per_byte(self) -> list[float]:
        """One for each run that has evaluated documents, else what it logged last."""
        values = [_bits_per_byte(run) for run in self.runs]
        return [value for value in values if value is not None]

    def mean(self, tag: str) -> float | None:
        """Of the final values of its runs."""
        values = [value for run in self.runs if (value := run.final(tag)) is not None]
        return float(np.mean(values)) if values else None


def group_by_seed(runs: Sequence[Run]) -> list[Variant]:
    """In the order of their first runs. Two runs of the same config and seed stay apart: they are one sample."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        recipe, copy = _recipe(run), 0
        while run.seed in [other.seed for other in groups.get((recipe, copy), [])]:
            copy += 1
        groups.setdefault((recipe, copy), []).append(run)
    return [Variant(_common_name(group), tuple(group)) for group in groups.values()]


def difference(variant: Variant, baseline: Variant) -> Interval | None:
    """Over seeds where both have several, else over documents; None where there is nothing to resample."""
    if not all(run.documents for run in (*variant.runs, *baseline.runs)):
        return None
    if len(variant.runs) > 1 and len(baseline.runs) > 1:
        paired = sorted(map(str, variant.seeds)) == sorted(map(str, baseline.seeds))
        return over_seeds(_in_seed_order(variant), _in_seed_order(baseline), paired)
    shared = sorted(set.intersection(*(set(run.documents) for run in (*variant.runs, *baseline.runs))))
    if len(shared) < FEW_DOCUMENTS:
        return None
    size = np.array([variant.runs[0].documents[name].bytes for name in shared], dtype=np.float64)
    return over_documents(_mean_nats(variant, shared), _mean_nats(baseline, shared), size)


def _in_seed_order(variant: Variant) -> list[float]:
    runs = sorted(variant.runs, key=lambda run: str(run.seed))
    return [value for run in runs if (value := _bits_per_byte(run)) is not None]


def _mean_nats(variant: Variant, names: Sequence[str]) -> Floats:
    """[N] nats of each document, averaged over the variant's runs."""
    return np.mean([[run.documents[name].nats for name in names] for run in variant.runs], axis=0)


def _bits_per_byte(run: Run) -> float | None:
    if not run.documents:
        return run.final("eval/bits_per_byte")
    values = run.documents.values()
    value = bits_per_byte(np.array([d.nats for d in values]), np.array([float(d.bytes) for d in values]))
    return value if math.isfinite(value) else None


def _recipe(run: Run) -> str:
    """The config without its seed and without what changes nothing of the result, as one text."""
    keys = {key: value for key, value in flatten(run.config) if key != "seed" and not is_bookkeeping(key)}
    return json.dumps(keys, sort_keys=True, default=str)


def _common_name(runs: Sequence[Run]) -> str:
    """`moe_seed0`, `moe_seed1` -> `moe`."""
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs]).rstrip("0123456789")
    for ending in ("-", "_", ".", "/", " "):
        common = common.removesuffix("seed").removesuffix("s" if common.endswith(f"{ending}s") else "")
    return common.rstrip("-_./ ") or runs[0].name
