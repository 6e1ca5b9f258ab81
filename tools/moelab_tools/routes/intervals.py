"""Means over tokens with intervals over documents: those of `compare`, of one run.

m documents. One trained model is looked at, so an interval says what other text would have given, and nothing of what
another training seed would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab_tools.compare.contrast import over_pairs
from moelab_tools.compare.families import holm

LEAST_DOCUMENTS = 2


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums, sum over documents / sum over documents."""

    value: float
    half: float | None  # of the 95 % interval; None: one document says nothing of the next
    p: float | None  # of the value being 0
    documents: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.value - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.value + self.half

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "p": self.p, "documents": self.documents}

    def told(self, digits: int = 4, scale: float = 1.0) -> str:
        """+0.0123 [+0.0100, +0.0146]"""
        if self.half is None:
            return f"{self.value * scale:+.{digits}f} [one document]"
        bounds = (self.value - self.half) * scale, (self.value + self.half) * scale
        return f"{self.value * scale:+.{digits}f} [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def estimates(sums: np.ndarray, size: np.ndarray) -> list[Estimate]:
    """sums [X, m], size [m] (tokens) -> X estimates, over the documents that have any."""
    there = size > 0
    if not there.any():
        return []
    documents = int(there.sum())
    contrast = over_pairs(sums[:, None, there], size[there])
    halves, p_values = contrast.half(), contrast.p_value()
    found = []
    for index, value in enumerate(np.atleast_1d(contrast.difference)):
        untouched = not sums[index].any()  # nothing was changed, which no other text of its kind makes uncertain
        known = documents >= LEAST_DOCUMENTS
        p = None if not known else 1.0 if untouched else float(p_values[index])
        found.append(Estimate(float(value), float(halves[index]) if known else None, p, documents))
    return found


def corrected(found: Sequence[Estimate]) -> list[float | None]:
    """Holm's p over those that have one (moelab_tools/compare/families.py)."""
    known = [index for index, one in enumerate(found) if one.p is not None]
    adjusted = dict(zip(known, holm([found[index].p or 0.0 for index in known]), strict=True))
    return [adjusted.get(index) for index in range(len(found))]
