"""Confidence intervals of a difference in held-out loss, over documents or over training seeds.

Two questions that are easily confused. Over documents: would these two trained models rank the same on other
text of this kind? Over seeds: would these two recipes rank the same if they were trained again?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
CONFIDENCE, RESAMPLES, CHUNK, SEED = 0.95, 10_000, 500, 0


@dataclass(frozen=True)
class Measure:
    """How held-out loss is counted: lower is better."""

    name: str
    per: str  # the attribute of a document that the nats are divided by
    per_nat: float
    tag: str  # what a run logs in this unit


BITS_PER_BYTE = Measure("bits per byte", "bytes", 1 / math.log(2), "eval/bits_per_byte")  # the same for every tokenizer
NATS_PER_TOKEN = Measure("nats per token", "tokens", 1.0, "eval/loss")  # for data whose bytes are not known


@dataclass(frozen=True)
class Interval:
    """A difference in held-out loss, run minus baseline, with its 95 % confidence interval."""

    difference: float
    low: float
    high: float
    method: str  # a sentence's end: "paired bootstrap over 80 held-out documents"
    covers: str  # "held-out text" or "training seeds"

    @property
    def verdict(self) -> str:
        """Lower loss is better; an interval that contains 0 resolves nothing."""
        if self.low <= 0 <= self.high:
            return "not resolved"
        return "better" if self.high < 0 else "worse"


def over_documents(loss: Floats, baseline: Floats, size: Floats) -> Interval:
    """loss, baseline, size: [N] of the same N >= 2 documents; resampled as pairs, so their common difficulty cancels.

    Percentile bootstrap of the ratio (sum of losses) / (sum of sizes). Few documents make plain percentiles too
    narrow, so the quantiles move outward as in Hesterberg 2015, "What teachers should know about the bootstrap".
    """
    documents = len(size)
    generator = np.random.default_rng(SEED)
    gap = loss - baseline
    draws = []
    for start in range(0, RESAMPLES, CHUNK):
        count = min(CHUNK, RESAMPLES - start)
        times = generator.multinomial(documents, np.full(documents, 1 / documents), size=count)  # [CHUNK, N]
        total = times @ size
        draws.append((times @ gap)[total > 0] / total[total > 0])  # a document may have no bytes
    widened = math.sqrt(documents / (documents - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, documents - 1)
    tail = stats.norm.cdf(-widened)
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(
        float(gap.sum() / size.sum()),
        float(low),
        float(high),
        f"paired bootstrap over {documents} held-out documents",
        "held-out text",
    )


def over_seeds(values: Sequence[float], baseline: Sequence[float], paired: bool) -> Interval:
    """Student's t on the pairs when both were trained with the same seeds, else Welch's; each needs two values."""
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    difference = float(first.mean() - second.mean())
    if paired:
        error, freedom = _mean_error(first - second), len(first) - 1.0
        method = f"paired t over {len(first)} training seeds"
    else:
        errors = _mean_error(first) ** 2, _mean_error(second) ** 2
        error = math.sqrt(sum(errors))
        spread = errors[0] ** 2 / (len(first) - 1) + errors[1] ** 2 / (len(second) - 1)
        freedom = error**4 / spread if spread else math.inf  # Welch & Satterthwaite
        method = f"Welch's t over {len(first)} and {len(second)} training seeds"
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(difference, difference - half, difference + half, method, "training seeds")


def _mean_error(values: Floats) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))
