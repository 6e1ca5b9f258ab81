"""Which runs of two variants belong together, and what their difference then rests on.

Runs of equal seeds are a pair: they start from what weights they share and read the same batches, which takes most
of the noise out of a difference. A mean of several runs is never subtracted from a single one: a single run is the
luck of its seed, and the mean is not, so their difference over the same text looks certain and is not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moelab_tools.compare.contrast import Contrast, Floats, over_groups, over_pairs

LEAST_PAIRS = 3  # for the words better and worse
Key = Hashable  # what tells the runs of a variant apart
Kind = Literal["pairs", "groups", "none"]


@dataclass(frozen=True)
class Losses:
    """What the runs of one variant made of the held-out documents that all compared runs share."""

    keys: tuple[Key, ...]  # n: equal keys in two variants make a pair
    nats: Floats  # [n, m], in the measure's unit
    size: Floats  # [m]: bytes or tokens

    @property
    def score(self) -> float:
        """The loss of all documents together, averaged over runs."""
        return float(self.nats.sum() / self.size.sum() / len(self.keys))


@dataclass(frozen=True)
class Matched:
    """Two variants made ready for a verdict."""

    kind: Kind
    contrast: Contrast | None = None  # None where nothing can be subtracted
    pairs: tuple[tuple[Key, Key], ...] = ()  # of variant and baseline; the keys are equal but for a single run of each
    groups: tuple[tuple[Key, ...], tuple[Key, ...]] = ((), ())  # where there are no pairs
    left_out: tuple[tuple[Key, ...], tuple[Key, ...]] = ((), ())  # runs without a partner
    identical: bool = False  # the same result to the last bit
    gaps: tuple[float, ...] = ()  # the difference of each pair

    @property
    def replicates(self) -> int:
        """Pairs; runs of the smaller side where there are no pairs."""
        return len(self.pairs) or min(map(len, self.groups))


def distinct(losses: Losses) -> tuple[Losses, list[tuple[Key, ...]]]:
    """One run for each different result, and the keys that gave the same one: what changes nothing is no sample."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(losses.nats):
        groups.setdefault(row.tobytes(), []).append(index)
    kept = [indices[0] for indices in groups.values()]
    same = [tuple(losses.keys[index] for index in indices) for indices in groups.values() if len(indices) > 1]
    return Losses(tuple(losses.keys[index] for index in kept), losses.nats[kept], losses.size), same


def match(variant: Losses, baseline: Losses) -> Matched:
    """By equal keys where there are three, else as groups where both have three; below that what pairs there are.

    The rule looks at the keys alone, never at which way would give the narrower interval. A single run of each is
    subtracted whatever the seeds: no verdict comes of it. Both must hold distinct results.
    """
    both = (variant.keys, baseline.keys)
    pairs = tuple((key, key) for key in variant.keys if key in baseline.keys)
    if len(variant.keys) == len(baseline.keys) == 1:
        pairs = ((variant.keys[0], baseline.keys[0]),)
    elif len(pairs) < LEAST_PAIRS <= min(map(len, both)):
        pairs = ()
    if pairs:
        used = tuple(zip(*pairs, strict=True))
        mine, theirs = (
            [one.keys.index(key) for key in keys] for one, keys in zip((variant, baseline), used, strict=True)
        )
        gap = variant.nats[mine] - baseline.nats[theirs]
        return Matched(
            "pairs",
            over_pairs(gap, variant.size),
            pairs,
            left_out=(_without(variant.keys, used[0]), _without(baseline.keys, used[1])),
            identical=not np.any(gap),
            gaps=tuple(map(float, gap.sum(1) / variant.size.sum())),
        )
    if min(map(len, both)) < 2:
        return Matched("none", left_out=both)
    return Matched("groups", over_groups(variant.nats, baseline.nats, variant.size), groups=both)


def _without(keys: Sequence[Key], used: Sequence[Key]) -> tuple[Key, ...]:
    return tuple(key for key in keys if key not in used)


def at_budget(matched: Matched, variant: Mapping[Key, float], baseline: Mapping[Key, float]) -> Matched | None:
    """The same comparison by the losses that runs had at an equal budget; None where one of them has none.

    Curves don't hold documents, so the error of the text is that of the final evaluation.
    """
    if matched.contrast is None:
        return None
    one = np.ones(1)
    mine, theirs = zip(*matched.pairs, strict=True) if matched.pairs else matched.groups
    if not all(key in variant for key in mine) or not all(key in baseline for key in theirs):
        return None
    first, second = np.array([[variant[key]] for key in mine]), np.array([[baseline[key]] for key in theirs])
    seeds = over_pairs(first - second, one) if matched.pairs else over_groups(first, second, one)
    text = {"text_error": matched.contrast.text_error, "text_freedom": matched.contrast.text_freedom}
    gaps = tuple(map(float, (first - second)[:, 0])) if matched.pairs else ()
    return replace(matched, contrast=replace(seeds, **text), gaps=gaps)
