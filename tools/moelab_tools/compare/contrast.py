"""The difference of two variants with its two errors: what another seed would do, and what other text would do.

Losses are nats of documents, and the loss of a run is a ratio: all nats by all bytes. So a document's say in a
difference is its residual from that ratio, and its spread is taken with one document left out at a time (jackknife;
with documents of equal size this is the textbook variance of a mean), because a long document pulls the ratio towards
itself.

The interval adds the two as squares: half^2 = (t over seeds x error over seeds)^2 + (t over documents x error over
text)^2. Each part stands for its own degrees of freedom, so that three seeds widen the first and not the second;
squaring and adding limits goes back to Howe 1974 (as MOVER, Zou & Donner 2008; read through a thesis that restates
both, the papers were not opened). It is never narrower than the t interval over seeds alone. How often it holds:
`benchmarks/results/verdict_coverage.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Numbers = Any  # a float, or an array of them when many comparisons are simulated at once
LEVEL = 0.05  # of an interval that may miss, of a verdict that may be false
LEAST_P, HALVINGS = 1e-12, 30  # of the search for a p value, in logarithms: to a part in ten million


def t_limit(level: Numbers, freedom: Numbers) -> Numbers:
    """What Student's |t| exceeds with probability `level`."""
    return -special.stdtrit(freedom, level / 2)  # scipy.stats.t.isf, without its 60 microseconds a call


@dataclass(frozen=True)
class Contrast:
    """Variant minus baseline, in the unit of the losses; an error of 0 means that its part is not known.

    Arrays [...] of each where many comparisons are held at once.
    """

    difference: Numbers
    seed_error: Numbers  # standard error over training seeds
    seed_freedom: Numbers
    text_error: Numbers  # standard error over held-out documents, without what the seeds do to each
    text_freedom: float

    def seed_half(self, level: float = LEVEL) -> Numbers:
        return t_limit(level, self.seed_freedom) * self.seed_error

    def text_half(self, level: float = LEVEL) -> Numbers:
        return t_limit(level, self.text_freedom) * self.text_error

    def half(self, level: float = LEVEL) -> Numbers:
        """Half the width of the interval that misses in `level` of all cases."""
        return np.hypot(self.seed_half(level), self.text_half(level))

    def p_value(self) -> Numbers:
        """The level at which the interval just reaches 0; at least LEAST_P."""
        low, high = np.full_like(self.difference, math.log(LEAST_P), dtype=float), np.zeros_like(self.difference, float)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            reaches = self.half(np.exp(middle)) >= np.abs(self.difference)
            low, high = np.where(reaches, middle, low), np.where(reaches, high, middle)
        return np.exp(high)


def over_pairs(gap: Floats, size: Floats) -> Contrast:
    """gap [..., n, m]: nats of the variant minus those of the baseline, n pairs of runs, m documents; size [m] bytes.

    With one pair nothing is known of the seed, and what the seed does to single documents counts as text.
    """
    pairs = gap.shape[-2]
    scores = gap.sum(-1) / size.sum()
    residual = _residuals(gap, size)
    text = _text_variance(residual.mean(-2), size) - _rest_variance(residual, size)
    error = scores.std(-1, ddof=1) / math.sqrt(pairs) if pairs > 1 else np.zeros(scores.shape[:-1])
    return Contrast(scores.mean(-1), error, max(pairs - 1.0, 1.0), *_text_part(text, size))


def over_groups(variant: Floats, baseline: Floats, size: Floats) -> Contrast:
    """variant [..., a, m], baseline [..., b, m]: runs that share no seeds, a and b >= 2; Welch's error and freedom.

    Freedom after Welch 1947 and Satterthwaite 1946 (read as the GUM's equation in metRology's documentation).
    """
    groups = (variant, baseline)
    scores = [nats.sum(-1) / size.sum() for nats in groups]
    squares = [one.var(-1, ddof=1) / one.shape[-1] for one in scores]
    total = squares[0] + squares[1]
    spread = sum(square**2 / (one.shape[-1] - 1) for square, one in zip(squares, scores, strict=True))
    freedom = np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), 1.0)
    residuals = [_residuals(nats, size) for nats in groups]
    text = _text_variance(residuals[0].mean(-2) - residuals[1].mean(-2), size)
    text = text - sum(_rest_variance(one, size) for one in residuals)
    difference = scores[0].mean(-1) - scores[1].mean(-1)
    return Contrast(difference, np.sqrt(total), freedom, *_text_part(text, size))


def _residuals(nats: Floats, size: Floats) -> Floats:
    """[..., n, m]: what each run's ratio would lose, times all bytes, were this document left out."""
    if np.count_nonzero(size) < 2:  # without the one document that counts nothing is left
        return np.zeros_like(nats)
    score = nats.sum(-1, keepdims=True) / size.sum()
    return (nats - score * size) / (1 - size / size.sum())


def _text_variance(residual: Floats, size: Floats) -> Floats:
    """residual [..., m] -> [...]: the jackknife variance of the ratio."""
    documents = len(size)
    return (documents - 1) / documents * (residual**2).sum(-1) / size.sum() ** 2


def _rest_variance(residual: Floats, size: Floats) -> Floats:
    """residual [..., n, m] -> [...]: what runs of one recipe make of single documents, in the mean of n of them."""
    runs = residual.shape[-2]
    if runs < 2:
        return np.zeros(residual.shape[:-2])
    rest = residual - residual.mean(-2, keepdims=True)
    return _text_variance(rest, size).sum(-1) / (runs - 1) / runs


def _text_part(variance: Floats, size: Floats) -> tuple[Numbers, float]:
    """(error, freedom); of a single document nothing is known."""
    return np.sqrt(np.maximum(variance, 0.0)), max(len(size) - 1.0, 1.0)
