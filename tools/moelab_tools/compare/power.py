"""What a comparison could have seen, and how many seeds a smaller difference needs.

Power is the share of repetitions in which an interval leaves 0 out on the right side, at a true difference. The noise
of the seeds is estimated anew in each repetition, so its chi-squared distribution is integrated over (with no text
error this is the noncentral t); the error of the text is taken as known. Everything is an estimate: three seeds don't
know their own noise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
from scipy import optimize, special

from moelab_tools.compare.contrast import LEVEL, Contrast, Floats

POWER = 0.8  # "could have seen": in four of five repetitions
LEAST_SEEDS, MOST_SEEDS = 3, 200  # pairs: fewer give no verdict, more are not proposed
NODES = 200


def power(difference: float, contrast: Contrast, level: float = LEVEL) -> float:
    """The share of comparisons with these errors that resolve a true `difference`."""
    share, part = _nodes()
    freedom = contrast.seed_freedom
    noise = special.chdtri(freedom, (1 - share) / 2) / freedom  # quantiles of the estimated variance over the true one
    half = np.sqrt(contrast.seed_half(level) ** 2 * noise + contrast.text_half(level) ** 2)
    error = math.hypot(contrast.seed_error, contrast.text_error)
    if error == 0:
        return float(difference != 0)
    return float(part / 2 @ special.ndtr((abs(difference) - half) / error))


def detectable(contrast: Contrast, level: float = LEVEL) -> float:
    """The true difference that `POWER` of such comparisons resolve, in the unit of the losses."""
    widest = contrast.half(level) + 10 * math.hypot(contrast.seed_error, contrast.text_error)
    if widest == 0:
        return 0.0
    top = 2 * float(widest)
    return float(optimize.brentq(lambda one: power(one, contrast, level) - POWER, 0.0, top, xtol=top * 1e-9))


@cache
def _nodes() -> tuple[Floats, Floats]:
    return np.polynomial.legendre.leggauss(NODES)


def with_pairs(contrast: Contrast, pairs: int, wanted: int) -> Contrast:
    """The errors of `pairs` pairs as they would be with `wanted`: the noise of a pair, and that of the text, stay."""
    freedom = contrast.seed_freedom * (wanted - 1) / (pairs - 1)
    return replace(contrast, seed_error=contrast.seed_error * math.sqrt(pairs / wanted), seed_freedom=freedom)


def text_limit(contrast: Contrast, level: float = LEVEL) -> float:
    """The true difference that `POWER` of comparisons resolve with endlessly many seeds: what the text leaves open."""
    return float(contrast.text_half(level) + special.ndtri(POWER) * contrast.text_error)


def seeds_needed(difference: float, contrast: Contrast, pairs: int, level: float = LEVEL) -> int | None:
    """The least number of pairs that resolves it with `POWER`; None when no number up to MOST_SEEDS does.

    None mostly means that the held-out text alone is the limit (`text_limit`): take more documents.
    """
    low, high = LEAST_SEEDS, MOST_SEEDS
    if power(difference, with_pairs(contrast, pairs, high), level) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        if power(difference, with_pairs(contrast, pairs, middle), level) >= POWER:
            high = middle
        else:
            low = middle + 1
    return low
