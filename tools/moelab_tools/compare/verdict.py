"""The word about each variant, the interval beside it, and what the comparison could have seen.

The rules, in the order in which they are asked:

- the same result to the last bit is **identical**; no common seed, and one run against several, is **no common
  seed**;
- one pair is **one seed**, two are **two seeds**: no better and no worse from so few, whatever the text says;
- pairs that all differ by the same have **no spread**: whatever the seeds change, it is not the result;
- a difference that is established, but smaller than what counts in practice, is **negligible**, and so is one whose
  whole interval lies within that (two one-sided tests, Schuirmann 1987; not opened);
- **better** and **worse** are resolved: by Holm's p values against a named baseline, else by an interval that holds
  for all pairs of variants together, since the lowest was picked by looking;
- **not resolved** is the rest: these runs do not tell.

Screening has words of its own, **likely better** and **likely worse**, from two seeds on: its moderated t assumes
that all variants are about as noisy, and holds in about 90 % of cases where one is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moelab_tools.compare.contrast import LEVEL, Contrast
from moelab_tools.compare.families import all_pairs_level, baseline_level, holm, moderated
from moelab_tools.compare.pairing import LEAST_PAIRS, Key, Losses, Matched, distinct, match
from moelab_tools.compare.power import detectable, seeds_needed, text_limit
from moelab_tools.compare.sequential import Plan, prospect

BETTER, WORSE, NOT_RESOLVED, NEGLIGIBLE = "better", "worse", "not resolved", "negligible"
IDENTICAL, NO_PAIR, ONE_SEED, TWO_SEEDS = "identical", "no common seed", "one seed", "two seeds"
NO_SPREAD = "no spread"
BEST, LOWEST = "best", "lowest"  # of a baseline that was found by looking
CUT_SHORT = "cut short"  # at an equal budget: see `judging`
WITHHELD = "withheld"  # a word that a run of an untaught router does not get: see `routers`
LIKELY = {BETTER: "likely better", WORSE: "likely worse"}
NO_NOISE = 1e-9  # of the loss: errors over seeds below this are rounding
PRACTICAL = 0.001  # of the baseline's loss: less does not count in practice
LEAST_SCREENED, LEAST_SCREENED_PAIRS = 2, 2  # variants beside the baseline, seeds: fewer can't be pooled
TARGETS = (1.0, 2.0, 5.0)  # the round numbers for which seeds are proposed
SMALLER = 0.6  # the proposed difference is at most this part of the one that could have been seen


@dataclass(frozen=True)
class Rules:
    """What is asked of the runs."""

    named: bool  # the baseline was named, not found by looking
    practical: float = PRACTICAL
    screening: bool = False
    error: float = LEVEL  # how often a word may be false, of all comparisons and looks together
    plan: Plan | None = None  # of looks before all seeds are in; with a named baseline, and no screening


@dataclass(frozen=True)
class Verdict:
    """One variant against the baseline; differences are variant minus baseline, in the measure's unit."""

    verdict: str
    difference: float | None
    low: float | None  # the interval, at `level`
    high: float | None
    seeds_half: float | None  # its two parts, which add as squares; None where it is not known
    text_half: float | None
    covers: str  # "training seeds and held-out text", "held-out text", or "nothing"
    method: str  # a sentence's end
    pairs: int  # of equal seeds; runs of the smaller side where they are not `paired`
    paired: bool
    p: float | None  # corrected; None where there is no test
    corrected_for: int  # comparisons
    level: float  # how often this interval alone may miss, so that all of them together miss in 5 %
    could_have_seen: float | None  # in the measure's unit, in 80 % of such comparisons
    smaller: float | None  # a smaller difference, and how many pairs it needs; None: more text, or more than 200
    seeds_for_smaller: int | None
    remarks: tuple[str, ...] = ()
    prospect: float | None = None  # the chance of a word at the last look; None where none is left
    seen_at_best: float | None = None  # what endlessly many pairs could have seen: the rest is the text's part
    apart: bool = field(init=False)  # the word is given though the interval holds 0, or not given though it does not

    def __post_init__(self) -> None:
        """Words go by Holm's steps, intervals by what holds for all at once, so the two may part."""
        known = self.low is not None and self.high is not None
        holds_zero = known and self.low <= 0 <= self.high  # type: ignore[operator]
        parts = {BETTER: holds_zero, WORSE: holds_zero, NOT_RESOLVED: known and not holds_zero}
        object.__setattr__(self, "apart", parts.get(self.verdict, False))


@dataclass(frozen=True)
class _Family:
    """The comparisons that can get a word."""

    contrasts: dict[str, Contrast]  # of each testable variant
    level: float  # of the intervals
    word_level: float  # a word's first threshold: of what could have been seen
    comparisons: int
    p: dict[str, float]
    resolved: dict[str, bool]
    correction: str  # a sentence's end
    screened: bool
    plan: Plan | None = None  # of looks


def judge(variants: Mapping[str, Losses], baseline: str, rules: Rules) -> dict[str, Verdict]:
    """Every variant but the baseline; all on the same documents. The same numbers in, the same verdicts out."""
    matched, remarks = match_all(variants, baseline)
    verdicts = decide(matched, abs(variants[baseline].score), rules)
    return {name: replace(one, remarks=(*remarks[name], *one.remarks)) for name, one in verdicts.items()}


def match_all(variants: Mapping[str, Losses], baseline: str) -> tuple[dict[str, Matched], dict[str, tuple[str, ...]]]:
    """Every variant with the baseline, and what has to be said of its runs."""
    single = {name: distinct(losses) for name, losses in variants.items()}
    matched = {name: match(single[name][0], single[baseline][0]) for name in variants if name != baseline}
    remarks = {
        name: (
            *_repeats(name, single[name][1]),
            *_repeats(baseline, single[baseline][1]),
            *_left_out(one, name, baseline),
        )
        for name, one in matched.items()
    }
    return matched, remarks


def decide(matched: Mapping[str, Matched], loss: float, rules: Rules) -> dict[str, Verdict]:
    """`loss` is the baseline's: what is practical is a part of it."""
    family = _screened(matched, loss, rules) if rules.screening else None
    remarks: tuple[str, ...] = ()
    if rules.screening and family is None:
        remarks = ("not screened: that takes two variants beside the baseline, and two seeds that all share",)
    family = family or _family(matched, loss, rules)
    return {name: _verdict(name, one, family, (rules, loss), remarks) for name, one in matched.items()}


def _family(matched: Mapping[str, Matched], loss: float, rules: Rules) -> _Family:
    known = {
        name: one.contrast
        for name, one in matched.items()
        if one.contrast and one.replicates >= LEAST_PAIRS and one.contrast.seed_error > NO_NOISE * loss
    }
    raw = {name: float(one.p_value()) for name, one in known.items()}
    count, error = len(known), rules.error
    if rules.plan is not None:
        return _looked_at(known, raw, rules.plan, error)
    freedom = min((float(one.seed_freedom) for one in known.values()), default=1.0)
    if rules.named:
        level, p = baseline_level(count, freedom, error=error), dict(zip(raw, holm(list(raw.values())), strict=True))
        resolved = {name: value <= error for name, value in p.items()}
        correction = f"words by Holm, interval by Dunnett, over {count} comparisons with the baseline"
        return _Family(known, level, error / max(count, 1), count, p, resolved, correction, False)
    pairs = count * (count + 1) // 2
    level = all_pairs_level(count + 1, freedom, error=error)
    resolved = {name: abs(one.difference) > one.half(level) for name, one in known.items()}
    p = {name: -math.expm1(pairs * math.log1p(-min(value, 1 - 1e-12))) for name, value in raw.items()}
    correction = f"corrected for all {pairs} pairs of {count + 1} variants (Tukey's question, by Tamhane's T2)"
    return _Family(known, level, level, pairs, p, resolved, correction, False)


def _looked_at(known: dict[str, Contrast], raw: Mapping[str, float], plan: Plan, error: float) -> _Family:
    """Holm's steps at this look's part of the error; intervals that hold at every look and for all comparisons."""
    count = len(known)
    resolved = dict.fromkeys(known, False)
    for rank, name in enumerate(sorted(raw, key=lambda one: raw[one])):
        if raw[name] > plan.level(error / (count - rank)):
            break
        resolved[name] = True
    level = plan.level(error / max(count, 1))
    looks = f"look {plan.at + 1} of {len(plan.looks)}, at {', '.join(map(str, plan.looks))} pairs"
    correction = f"{looks} ({plan.spending} spending), words by Holm over {count} comparisons with the baseline"
    return _Family(known, level, level, count, {}, resolved, correction, False, plan)


def _screened(matched: Mapping[str, Matched], loss: float, rules: Rules) -> _Family | None:
    """With moderated noise, over the seeds that all pairs share; None where there is too little to pool."""
    known = {name: one for name, one in matched.items() if one.pairs and one.contrast and not one.identical}
    shared = [key for key, _ in next(iter(known.values())).pairs] if known else []
    shared = [key for key in shared if all((key, key) in one.pairs for one in known.values())]
    if len(known) < LEAST_SCREENED or len(shared) < LEAST_SCREENED_PAIRS:
        return None
    gaps = np.array([[one.gaps[one.pairs.index((key, key))] for key in shared] for one in known.values()])
    contrasts, freedom = moderated(gaps, [one.contrast for one in known.values() if one.contrast])
    if any(one.seed_error <= NO_NOISE * loss for one in contrasts):
        return None
    moderate, count = dict(zip(known, contrasts, strict=True)), len(known)
    groups, of = (count, baseline_level) if rules.named else (count + 1, all_pairs_level)
    error = rules.error
    comparisons = count if rules.named else count * (count + 1) // 2
    # Pooled noise makes comparisons miss together, which allows a larger level; the text of each is its own.
    freedoms = (freedom, contrasts[0].text_freedom)
    level = min(of(groups, known_freedom, pooled=True, error=error) for known_freedom in freedoms)
    resolved = {name: abs(one.difference) > one.half(level) for name, one in moderate.items()}
    correction = f"screening: noise pooled over {count + 1} variants, {'Dunnett' if rules.named else 'Tukey'}"
    return _Family(moderate, level, level, comparisons, {}, resolved, correction, True)


def _verdict(name: str, one: Matched, family: _Family, asked: tuple[Rules, float], remarks: tuple[str, ...]) -> Verdict:
    rules, loss = asked
    limit = rules.practical * loss
    tested = name in family.contrasts
    contrast = family.contrasts.get(name, one.contrast)
    level = family.level if tested else rules.error
    if contrast is None:
        return Verdict(
            NO_PAIR, None, None, None, None, None, "nothing", "no interval", 0, False,
            None, 0, LEVEL, None, None, None, remarks,
        )  # fmt: skip
    difference, half = float(contrast.difference), float(contrast.half(level))
    word = _word(one, difference, half, limit, family.resolved.get(name))
    word = LIKELY.get(word, word) if family.screened else word
    seen = detectable(contrast, family.word_level) if tested else None
    smaller = _round_below(seen / loss * SMALLER) * loss if seen and loss else None
    needed = None
    if smaller is not None and tested and not family.screened:
        needed = seeds_needed(smaller, contrast, one.replicates, family.word_level)
    seeds_known = bool(contrast.seed_error > 0)
    return Verdict(
        verdict=word,
        difference=difference,
        low=difference - half if half or one.identical else None,
        high=difference + half if half or one.identical else None,
        seeds_half=float(contrast.seed_half(level)) if seeds_known else None,
        text_half=float(contrast.text_half(level)) if contrast.text_error > 0 else None,
        covers="training seeds and held-out text" if seeds_known else "held-out text",
        method=_method(one, family, tested),
        pairs=one.replicates,
        paired=one.kind == "pairs",
        p=family.p.get(name),
        corrected_for=family.comparisons if tested else 0,
        level=level,
        could_have_seen=seen,
        smaller=smaller if not family.screened else None,
        seeds_for_smaller=needed,
        remarks=remarks,
        prospect=_prospect(contrast, one, family, rules, limit) if tested else None,
        seen_at_best=text_limit(contrast, family.word_level) if tested else None,
    )


def _prospect(contrast: Contrast, one: Matched, family: _Family, rules: Rules, limit: float) -> float | None:
    """Of a word at the last look, by the noise so far."""
    if family.plan is None or family.plan.last or one.replicates >= family.plan.looks[-1]:
        return None
    level = family.plan.final_level(rules.error / max(family.comparisons, 1))
    return float(prospect(contrast, one.replicates, family.plan.looks[-1], level, limit))


def _word(one: Matched, difference: float, half: float, limit: float, resolved: bool | None) -> str:
    """`resolved`: None where there was no test."""
    if one.identical:
        return IDENTICAL
    if resolved is None:
        return {1: ONE_SEED, 2: TWO_SEEDS}.get(one.replicates, NO_SPREAD)
    if abs(difference) + half <= limit or (resolved and abs(difference) <= limit):
        return NEGLIGIBLE
    if not resolved:
        return NOT_RESOLVED
    return BETTER if difference < 0 else WORSE


def _method(one: Matched, family: _Family, tested: bool) -> str:
    documents = "held-out documents"
    if not tested and one.replicates < 2:
        return f"t over {documents} of one run each"
    how = "moderated t" if tested and family.screened else "paired t" if one.kind == "pairs" else "Welch's t"
    over = f"{one.replicates} {'pairs of seeds' if one.kind == 'pairs' else 'or more seeds of each'}"
    needed = family.comparisons > 1 or family.screened or family.plan is not None
    corrected = f"; {family.correction}" if tested and needed else ""
    return f"{how} over {over} and over {documents}, added as squares{corrected}"


def _round_below(value: float) -> float:
    """The largest of 1, 2, 5, 10, ... parts of a power of ten that is not above it."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * max(step for step in TARGETS if step * power <= value * (1 + 1e-12))


def _repeats(name: str, same: Sequence[tuple[Key, ...]]) -> list[str]:
    return [
        f"{name}: seeds {', '.join(map(str, keys))} gave the same result to the last bit, so they count as one run"
        for keys in same
    ]


def _left_out(one: Matched, name: str, baseline: str) -> list[str]:
    told = []
    for who, keys in zip((name, baseline), one.left_out, strict=True):
        if keys and one.kind == "pairs":
            told.append(f"{who}: seeds {', '.join(map(str, keys))} have no partner and stay out of the difference")
    return told
