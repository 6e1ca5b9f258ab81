"""Which of many tagged items are taken: those that say the most, in rounds that each cover as many tags as they can.

Of whatever has tags: documents, conversations, prompts. An item's complexity is the number of its tags, a set's
diversity the number of tags that stand in it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cover:
    """What was taken, and of what."""

    chosen: list[int]  # indices of the items, in the order in which they were taken
    rounds: int
    tags: int  # that stand in the items chosen
    of_tags: int  # that stand in any
    complexity: float  # tags of an item chosen, on average
    of_complexity: float  # and of any

    def __str__(self) -> str:
        return (
            f"{len(self.chosen):,} in {self.rounds:,} rounds: {self.tags:,} of {self.of_tags:,} tags, "
            f"{self.complexity:.2f} tags each (of all {self.of_complexity:.2f})"
        )


def complex_and_diverse(
    tags: Iterable[Collection[Hashable]], count: int, priority: Sequence[int] | np.ndarray | None = None
) -> Cover:
    """Up to `count` items. tags [n]: of each item; priority [n]: among items of equally many tags the lower is first.

    Items are looked at from the most tags down, and one is taken where it brings a tag that none of this round has;
    then a round begins anew with those that are left. It ends at `count`, or where only items without a tag are left.
    What is taken hangs on `priority`, and where that is equal or None on the order of the items.

    InsTag (2308.07074, section 4.1), "complexity-first diverse sampling". Its Algorithm 1 could not be opened: this is
    what it does by a published program that says it follows it. There what has no tag fills up what lacks; here it is
    left, so that less than `count` may come.

    Items of the same tags stand for one another, so that a round costs the number of different sets of tags, and an
    item some 30 bytes, whatever its tags are.
    """
    known: dict[frozenset[Hashable], int] = {}
    kind_of = np.fromiter((known.setdefault(frozenset(own), len(known)) for own in tags), np.int32)
    kinds = list(known)
    ranks = np.arange(len(kind_of)) if priority is None else np.argsort(np.asarray(priority), kind="stable")
    by_kind = ranks[np.argsort(kind_of[ranks], kind="stable")]  # the items of each kind together, the first first
    sizes = np.bincount(kind_of, minlength=len(kinds))
    ends = np.cumsum(sizes)
    place = np.empty(len(kind_of), np.int64)
    place[ranks] = np.arange(len(ranks))
    heads = (ends - sizes).tolist()
    waiting, every = [number for number, kind in enumerate(kinds) if kind], len(set[Hashable]().union(*kinds))
    chosen, said, covered, rounds = list[int](), 0, set[Hashable](), 0
    while waiting and len(chosen) < count:
        rounds += 1
        seen: set[Hashable] = set()
        for number in sorted(waiting, key=lambda one: (-len(kinds[one]), place[by_kind[heads[one]]])):
            if kinds[number] <= seen:
                continue
            seen |= kinds[number]
            said += len(kinds[number])
            chosen.append(int(by_kind[heads[number]]))
            heads[number] += 1
            if len(chosen) == count or len(seen) == every:
                break
        covered |= seen
        waiting = [number for number in waiting if heads[number] < ends[number]]
    complexity = float(np.dot(sizes, [len(kind) for kind in kinds])) / max(1, len(kind_of))
    return Cover(chosen, rounds, len(covered), every, said / max(1, len(chosen)), complexity)
