"""Which domain each window of a training run is of: a pure function of (seed, step), so resuming needs no state.

A mixer (`data.mixer`) says what share of the tokens each domain gets, phase by phase. Shares are kept as closely as
whole windows allow: the windows of a cycle are dealt out evenly spaced, so every batch holds nearly the asked mixture,
and the n-th window of a domain has a number that is computed, not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from moelab.errors import ConfigError, near
from moelab.seeds import derive_seed

CYCLE = 10_000  # windows; a domain's share is met to half of one in so many


@dataclass(frozen=True)
class MixContext:
    """What a mixer is told beside its options."""

    domains: Mapping[str, int]  # {domain: training tokens}, none of them 0
    tokens: int  # that the run is planned to read

    def among(self, patterns: Sequence[str] | None) -> dict[str, int]:
        """The domains that patterns such as */yes name, all for None. Raises ConfigError for one that names none."""
        return {name: self.domains[name] for name in matching(patterns, list(self.domains))}


def matching(patterns: Sequence[str] | None, domains: Sequence[str]) -> list[str]:
    """The domains that one of the patterns names, in their order; all for None.

    Raises ConfigError for a pattern that names none."""
    if patterns is None:
        return list(domains)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in domains):
            raise ConfigError(
                f"domains: no domain '{pattern}'{near(pattern, domains)} Domains: {', '.join(sorted(domains))}"
            )
    return [name for name in domains if any(fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Phase:
    """Shares that hold until a step, or to the end."""

    weights: Mapping[str, float]  # {domain: share of the tokens}; in whatever unit, those left out get none
    until: int | None = None  # steps from the run's beginning; None: to the end


@dataclass(frozen=True)
class Mixer:
    """A run's mixture. Raises ConfigError unless the phases follow each other and the last has no end."""

    phases: Sequence[Phase]

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or ends[-1] is not None or None in ends[:-1]:
            raise ConfigError("phases: the last one, and no other, goes on to the end (no `until`)")
        known = [0, *(end for end in ends if end is not None)]
        if any(after <= before for before, after in itertools.pairwise(known)):
            raise ConfigError(f"phases: each ends later than the one before it, and later than step 0; got {known[1:]}")


def shares(weights: Mapping[str, float], domains: Sequence[str]) -> np.ndarray:
    """-> [domains] float64, summing to 1. Raises ConfigError naming a domain that is not there, or a wrong number."""
    if unknown := [name for name in weights if name not in domains]:
        raise ConfigError(
            f"no domain '{unknown[0]}' in the training text{near(unknown[0], domains)} Domains: {', '.join(domains)}"
        )
    if bad := {name: value for name, value in weights.items() if not (math.isfinite(value) and value >= 0)}:
        name, value = next(iter(bad.items()))
        raise ConfigError(f"the weight of '{name}' is {value}; a weight is a number from 0 up")
    asked = np.array([float(weights.get(name, 0.0)) for name in domains])
    if asked.sum() <= 0:
        raise ConfigError("every weight is 0: no text is left to train on")
    return asked / asked.sum()


class Deal:
    """The windows of one phase, dealt to D domains: `domain_of` the n-th, its number `within` that domain."""

    def __init__(self, wanted: np.ndarray, domains: Sequence[str], seed: int, phase: int) -> None:
        """wanted [D] float64, summing to 1. The seed says where each domain begins in the cycle."""
        self.quota = _quotas(wanted)  # [D] int64
        begins = [derive_seed(seed, "mixture", phase, name) / 2**63 for name in domains]  # [D] in 0 .. 1
        at = [(np.arange(count) + begin) / max(count, 1) for count, begin in zip(self.quota, begins, strict=True)]
        domain = np.repeat(np.arange(len(wanted)), self.quota)
        order = np.argsort(np.concatenate(at), kind="stable")
        self.label = domain[order]  # [CYCLE]
        number = np.concatenate([np.arange(count) for count in self.quota])
        self.number = number[order]  # [CYCLE], rising in each domain

    def domain_of(self, sample: np.ndarray) -> np.ndarray:
        """sample [n] int64 from the phase's beginning -> domain [n] int64."""
        return self.label[sample % CYCLE]

    def within(self, sample: np.ndarray) -> np.ndarray:
        """sample [n] int64 -> how many windows of its domain the phase dealt before it, [n] int64."""
        place = sample % CYCLE
        return sample // CYCLE * self.quota[self.label[place]] + self.number[place]

    def dealt(self, samples: int) -> np.ndarray:
        """How many of the first `samples` windows each domain has: [D] int64."""
        cycles, rest = divmod(samples, CYCLE)
        return cycles * self.quota + np.bincount(self.label[:rest], minlength=len(self.quota))


def _quotas(wanted: np.ndarray) -> np.ndarray:
    """[D] shares -> [D] int64 windows of a cycle by largest remainder; what is asked for at all gets at least one."""
    exact = wanted * CYCLE
    quota = np.floor(exact).astype(np.int64)
    quota[(wanted > 0) & (quota == 0)] = 1
    rest = CYCLE - int(quota.sum())
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    if rest > 0:
        quota[by_remainder[:rest]] += 1
    for _ in range(-rest):  # ones that were raised are taken from the largest
        quota[int(np.argmax(quota))] -= 1
    return quota
