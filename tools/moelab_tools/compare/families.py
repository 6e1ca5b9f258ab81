"""Several verdicts at once: how sure each must be so that together they are false in at most one case of twenty.

A named baseline: Holm's p values decide on words (Holm 1979), Dunnett's constant widens the intervals. None named:
the baseline was picked by looking, so all pairs are corrected for, whichever was picked (Tukey's question).

**A departure.** `scipy.stats.dunnett` and Tukey's range assume one noise for all variants and pool it. Here it
differs by a factor of three between recipes (shared order of data, dense against MoE), and pooled intervals then hold
in 89 % of cases, so each comparison brings its own noise. The textbook constants are then too small: with 3 seeds and
5 variants they are false in 8 % (Dunnett) and 9 % (Tukey, the lowest as baseline) of families. So Dunnett's integral
is taken here with a noise of its own for each comparison, and pairs are corrected as in Tamhane's T2 (Sidak's bound;
PMCMRplus documents it, the paper of 1979 was not opened). The textbook ones are right, and used, where noise is
pooled: in screening.

**Screening** (moderated t): a comparison's own variance is drawn towards the one pooled over all variants, as if that
were two more degrees of freedom (Smyth 2004: s^2 = (d0 s0^2 + d s^2) / (d0 + d), with d0 + d degrees of freedom and
no more than the pooled ones, as in limma's squeezeVar; limma estimates d0, here it is fixed, because three variants
can't tell it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from scipy import optimize, stats

from moelab_tools.compare.contrast import LEVEL, Contrast, Floats, Numbers

PRIOR_FREEDOM = 2.0  # of the pooled noise in a moderated t: more than this fails where one variant is far noisier
NODES, HERMITE_NODES = 200, 64  # of the quadratures over the noise and over the baseline
WIDEST = 1e4  # a critical value beyond any that is asked for


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted: the one of rank i of k (from 0) is multiplied by k - i, and none is less than one before it."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def baseline_level(comparisons: int, freedom: float, *, pooled: bool = False, error: float = LEVEL) -> float:
    """The level of each of `comparisons` intervals against one baseline so that all hold together (Dunnett)."""
    if comparisons <= 1:
        return error
    return float(2 * stats.t.sf(dunnett(comparisons, freedom, pooled=pooled, error=error), freedom))


def all_pairs_level(groups: int, freedom: float, *, pooled: bool = False, error: float = LEVEL) -> float:
    """The same for every pair of `groups` variants: Tamhane's T2, or Tukey's range where the noise is pooled."""
    pairs = groups * (groups - 1) // 2
    if pairs <= 1:
        return error
    if pooled:
        return float(2 * stats.t.sf(tukey(groups, freedom, error), freedom))
    return float(-np.expm1(np.log1p(-error) / pairs))


@cache
def tukey(groups: int, freedom: float, error: float = LEVEL) -> float:
    """The 95 % point of the largest |t| among all pairs of `groups` variants whose noise is pooled."""
    return float(stats.studentized_range.isf(error, groups, freedom) / np.sqrt(2))


@cache
def dunnett(comparisons: int, freedom: float, *, pooled: bool = False, error: float = LEVEL) -> float:
    """The 95 % point of the largest |t| among `comparisons` differences to one baseline of like noise (Dunnett 1955).

    Given the baseline's own error z and the noise s, the comparisons are independent, each within c sqrt(2) s of z.
    Pooled: they share s, which gives scipy.stats.dunnett's value; else each has its own.
    """
    z, weight = np.polynomial.hermite_e.hermegauss(HERMITE_NODES)
    weight = weight / weight.sum()
    share, part = np.polynomial.legendre.leggauss(NODES)
    noise = np.sqrt(stats.chi2.ppf((share + 1) / 2, freedom) / freedom)[:, None]
    part = part / 2

    def excess(critical: float) -> float:
        reach = np.sqrt(2) * critical * noise
        inside = stats.norm.cdf(z + reach) - stats.norm.cdf(z - reach)  # [noise, z]
        held = part @ inside**comparisons if pooled else (part @ inside) ** comparisons
        return float(weight @ held - (1 - error))

    return float(optimize.brentq(excess, 1.0, WIDEST))


def moderated(gaps: Floats, contrasts: Sequence[Contrast]) -> tuple[list[Contrast], float]:
    """gaps [V, ..., n]: losses of V >= 2 variants minus those of one baseline, on the same n >= 2 seeds.

    -> the contrasts with a moderated error over seeds, and its degrees of freedom. The pooled square is that of the
    residuals of runs by seed and by variant, the baseline among the variants.
    """
    variants, seeds = len(gaps), gaps.shape[-1]
    scores = np.concatenate([np.zeros_like(gaps[:1]), gaps])  # [V + 1, ..., n]
    rest = scores - scores.mean(0) - scores.mean(-1, keepdims=True) + scores.mean((0, -1), keepdims=True)
    pooled_freedom = variants * (seeds - 1.0)
    pooled: Numbers = 2 * (rest**2).sum((0, -1)) / pooled_freedom
    prior, own = min(PRIOR_FREEDOM, pooled_freedom), seeds - 1.0
    freedom = min(prior + own, pooled_freedom)
    squares = (prior * pooled + own * gaps.var(-1, ddof=1)) / (prior + own) / seeds  # [V, ...]
    moderate = [
        replace(one, difference=gap, seed_error=error, seed_freedom=freedom)
        for one, gap, error in zip(contrasts, gaps.mean(-1), np.sqrt(squares), strict=True)
    ]
    return moderate, freedom
