"""A linear classifier over hashed n-grams of words: logistic regression, then a calibration on texts it did not see.

W buckets, n documents. A text is the set of buckets that its n-grams fall into, each weighing 1 / sqrt(their number).
Hashing: Weinberger et al. 0902.2206. Steps are AdaGrad's (Duchi et al. 2011); the calibration, two numbers, is Platt's
(1999). None of the three was opened for this: the formulas are the common ones, and the tests hold what they promise.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab.data.identity import mix, split_value, text_identity
from moelab.seeds import derive_seed

_WORD = re.compile(r"\w+|[^\w\s]")
RATE, DECAY = 0.5, 1e-6  # of AdaGrad's steps; pull of each step towards 0
HELD_OUT, BINS = 0.2, 10  # share of the documents that calibrate; bins of the calibration error


@dataclass(frozen=True)
class Quality:
    """On the documents that were not trained on."""

    documents: int
    right: float  # share on the right side of 0.5
    calibration_error: float  # mean difference of probability and share, over bins weighted by their documents


@dataclass(frozen=True)
class Classifier:
    """`probability(text)` that a text is of the wanted kind."""

    weights: np.ndarray  # [W] float64
    bias: float
    scale: float  # of Platt's: sigmoid(scale * score + shift)
    shift: float
    ngrams: int
    quality: Quality

    def probability(self, text: str) -> float:
        return float(_sigmoid(self.scale * self.score(text) + self.shift))

    def score(self, text: str) -> float:
        found = buckets(text, self.ngrams, len(self.weights))
        return float(self.weights[found].sum() / np.sqrt(max(1, len(found))) + self.bias)


def buckets(text: str, ngrams: int, size: int) -> np.ndarray:
    """The distinct buckets of a text's n-grams of 1 .. `ngrams` words, in lower case: [m] int64."""
    words = [zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(text.lower())]
    hashed = np.array(words, np.uint64)
    found, running = [], np.zeros(len(hashed), np.uint64)
    for length in range(1, min(ngrams, len(hashed)) + 1):
        last = hashed[length - 1 :]
        running = mix(running[: len(last)] * np.uint64(31) + last + np.uint64(length))
        found.append(running % np.uint64(size))
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *found])).astype(np.int64)


def train(wanted: Sequence[str], other: Sequence[str], *, ngrams: int, size: int, passes: int) -> Classifier:
    """Both kinds count the same, however many there are of each. The same texts give the same weights, in any order."""
    documents = sorted({(text_identity(text), text, 1.0) for text in wanted} | {
        (text_identity(text), text, 0.0) for text in other
    })  # fmt: skip
    held_out = [split_value(identity, 0) < HELD_OUT for identity, _, _ in documents]
    found = [buckets(text, ngrams, size) for _, text, _ in documents]
    label = np.array([kind for _, _, kind in documents])
    learnt, judged = np.flatnonzero(~np.array(held_out)), np.flatnonzero(held_out)
    weight = np.where(label == 1, 0.5 / max(1, label[learnt].sum()), 0.5 / max(1, (1 - label[learnt]).sum()))
    weight = weight / weight[learnt].mean()
    weights, squares = np.zeros(size), np.full(size, 1e-8)
    bias, bias_square = 0.0, 1e-8
    for number in range(passes):
        for at in np.random.default_rng(derive_seed(0, "classifier", number)).permutation(learnt).tolist():
            own, norm = found[at], 1 / np.sqrt(max(1, len(found[at])))
            error = weight[at] * float(_sigmoid(weights[own].sum() * norm + bias) - label[at])
            slope = error * norm + DECAY * weights[own]
            squares[own] += slope**2
            weights[own] -= RATE * slope / np.sqrt(squares[own])
            bias_square += error**2
            bias -= RATE * error / np.sqrt(bias_square)
    score = np.array([weights[found[at]].sum() / np.sqrt(max(1, len(found[at]))) + bias for at in judged.tolist()])
    scale, shift = _platt(score, label[judged], weight[judged])
    return Classifier(weights, bias, scale, shift, ngrams, _quality(_sigmoid(scale * score + shift), label[judged]))


def _platt(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """(scale, shift) of the largest likelihood under Platt's softened targets, by Newton's method; [n] each."""
    positive, negative = label.sum(), (1 - label).sum()
    target = np.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    at = np.array([1.0, 0.0])
    inputs = np.stack([score, np.ones_like(score)])
    for _ in range(50):
        given = _sigmoid(at @ inputs)
        slope = inputs @ (weight * (given - target))
        bend = (inputs * (weight * given * (1 - given))) @ inputs.T + 1e-6 * np.eye(2)
        step = np.linalg.solve(bend, slope)
        at = at - np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    return float(at[0]), float(at[1])


def _quality(given: np.ndarray, label: np.ndarray) -> Quality:
    if not len(given):
        return Quality(0, float("nan"), float("nan"))
    place = np.minimum((given * BINS).astype(int), BINS - 1)
    error = sum(
        (place == bin_).sum() * abs(given[place == bin_].mean() - label[place == bin_].mean())
        for bin_ in np.unique(place)
    )
    return Quality(len(given), float(((given > 0.5) == (label == 1)).mean()), float(error / len(given)))


def _sigmoid(value: np.ndarray | float) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(value, -500, 500))))
