"""Looking at seeds before all of them are in: how much of the 5 % each look may spend, and when to give up.

A **plan** names the numbers of pairs at which one looks, 3, 5, 8: the last is all of them. Lan and DeMets (1983)
spend the allowed error by a function of the information that is in, here the share of pairs; O'Brien-Fleming's type is

    f(t) = 2 - 2 Phi(z_(1 - a/2) / sqrt(t)),    and Pocock's    f(t) = a ln(1 + (e - 1) t),

a on each side (as gsDesign's documentation gives them; the paper was not opened). The bound of a look is what is first
crossed there with the probability that this look spends.

**A departure.** The published bounds are those of a normal statistic with known noise. Used as levels of t intervals
over so few pairs they are false in 5.2 to 5.6 % (`benchmarks/results/sequential.md`), since t statistics of so few
pairs hang together less. Here the bounds are those of the t statistics themselves, exactly: without a difference the
direction of n normal numbers is independent of their length, so r = t / sqrt(n - 1 + t^2), the cosine between them
and the mean's direction, is a Markov chain over looks,

    r_after = (r sqrt(n B) + r' sqrt(m (1 - B))) / sqrt(n + m),    B ~ Beta(n/2, m/2),

with r' the same of the m pairs that came in. For many pairs these are the published bounds (tested).

Several variants: Holm's steps, each at its own share of the error, a / k, a / (k - 1), ..., and the bounds of a whole
design of that error (Maurer & Bretz 2013, not opened).

**Giving up** does not touch the bounds, so it can't make a verdict false; it may cost one. `prospect` is predictive:
the chance, over what the difference can be after what was seen, that the last look gives a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, special

from moelab_tools.compare.contrast import LEVEL, Contrast, Floats, Numbers
from moelab_tools.compare.pairing import LEAST_PAIRS
from moelab_tools.compare.power import with_pairs

BINS, NODES = 100, 100  # of the chain's state, and of the quadrature over B
LEAST_SPENT = 1e-12  # of a look: less is no bound that anything crosses
HOPELESS = 0.1  # a prospect below this is given up
LEAST_SPREAD = 1e-300


def obrien_fleming(error: float, share: float) -> float:
    """What of a one-sided `error` is spent when `share` of the information is in."""
    return float(2 * special.ndtr(special.ndtri(error / 2) / math.sqrt(share)))


def pocock(error: float, share: float) -> float:
    """The same, spent more evenly."""
    return error * math.log1p((math.e - 1) * share)


SPENDING: dict[str, Callable[[float, float], float]] = {"obrien_fleming": obrien_fleming, "pocock": pocock}


@dataclass(frozen=True)
class Plan:
    """When one looks; `at` is the look that is taken. With one look the level is the whole error."""

    looks: tuple[int, ...]  # numbers of pairs, at least 3, rising; the last is all of them
    at: int = 0  # index in `looks`
    spending: str = "obrien_fleming"

    @property
    def last(self) -> bool:
        return self.at == len(self.looks) - 1

    def level(self, error: float = LEVEL) -> float:
        """Of the intervals at this look, where all looks together may be wrong in `error` of all cases."""
        return levels(self.looks, error, self.spending)[self.at]

    def final_level(self, error: float = LEVEL) -> float:
        """Of the intervals at the last look."""
        return levels(self.looks, error, self.spending)[-1]


@cache
def levels(looks: tuple[int, ...], error: float, spending: str = "obrien_fleming") -> tuple[float, ...]:
    """The two-sided level of a t interval over the pairs of each look; half of `error` is spent on each side."""
    assert looks[0] >= LEAST_PAIRS, "of two pairs the chain's state is too steep at its ends for these bins"
    if len(looks) == 1:
        return (error,)
    found: list[float] = []
    state, mass = np.zeros(0), np.zeros(0)  # r of what crossed no bound, and its probability
    before, spent = 0, 0.0
    for pairs in looks:
        until = 2 * SPENDING[spending](error / 2, pairs / looks[-1])
        arrived = _first(pairs) if before == 0 else _step(state, mass, before, pairs)
        still = 1.0 if before == 0 else float(mass.sum())

        def crossed(level: float, arrived: Distribution = arrived, pairs: int = pairs, still: float = still) -> float:
            reach = _cosine(level, pairs)
            low, high = arrived(np.array([-reach, reach]))
            return float(still - (high - low))

        here = max(until - spent, 0.0)
        level = LEAST_SPENT
        if here > crossed(LEAST_SPENT):
            level = _where(crossed, here)
        found.append(level)
        edges = np.linspace(-1, 1, BINS + 1) * _cosine(level, pairs)
        state, mass = (edges[1:] + edges[:-1]) / 2, np.diff(arrived(edges))
        before, spent = pairs, until
    return tuple(found)


Distribution = Callable[[Floats], Floats]


def _where(crossed: Callable[[float], float], wanted: float) -> float:
    """The level that is crossed with this probability."""
    log = optimize.brentq(lambda one: crossed(math.exp(one)) - wanted, math.log(LEAST_SPENT), 0.0, xtol=1e-10)
    return math.exp(log)


def _cosine(level: float, pairs: int) -> float:
    """r of the t that is exceeded in absolute value with probability `level`."""
    t = -float(special.stdtrit(pairs - 1, level / 2))
    return t / math.sqrt(pairs - 1 + t * t) if math.isfinite(t) else 1.0


def _first(pairs: int) -> Distribution:
    """The distribution of r of so many normal numbers."""

    def below(cosine: Floats) -> Floats:
        inside = np.clip(cosine, -1, 1)
        if pairs == 1:
            return np.where(cosine < -1, 0.0, np.where(cosine < 1, 0.5, 1.0))
        with np.errstate(divide="ignore"):
            t = inside * np.sqrt((pairs - 1) / (1 - inside**2))
        return np.asarray(special.stdtr(pairs - 1, t))

    return below


def _step(state: Floats, mass: Floats, before: int, pairs: int) -> Distribution:
    """The distribution of r at the next look, of what crossed no bound so far: it rises to the sum of `mass`."""
    new = pairs - before
    node, weight = np.polynomial.legendre.leggauss(NODES)
    share = special.betaincinv(before / 2, new / 2, (node + 1) / 2)[:, None]  # B
    part, alone = weight / 2, _first(new)
    old = np.sqrt(before * share) * state  # [B, states]

    def below(cosine: Floats) -> Floats:
        needed = (np.sqrt(pairs) * cosine[:, None, None] - old) / np.sqrt(new * (1 - share))
        return np.asarray(np.einsum("rbs,b,s->r", alone(needed), part, mass))

    return below


def prospect(contrast: Contrast, pairs: int, wanted: int, level: float, practical: Numbers) -> Numbers:
    """The chance that with `wanted` pairs the difference gets a word: better, worse, or negligible below `practical`.

    `contrast` is of `pairs` pairs, `level` that of the intervals then. What the mean of all pairs will be follows
    Student's t around that of the pairs so far, with a spread of s sqrt((wanted - pairs) / (pairs wanted)); the
    interval then is projected from the noise so far. The error of the held-out text stays as it is.
    """
    half, difference = with_pairs(contrast, pairs, wanted).half(level), contrast.difference
    spread = np.maximum(contrast.seed_error * math.sqrt((wanted - pairs) / wanted), LEAST_SPREAD)

    def below(limit: Numbers) -> Numbers:
        return special.stdtr(contrast.seed_freedom, (limit - difference) / spread)

    found = 1 - (below(half) - below(-half))
    narrow = np.maximum(practical - half, 0)  # a mean within this is established as negligible
    return np.minimum(found + np.where(narrow > 0, below(narrow) - below(-narrow), 0.0), 1.0)
