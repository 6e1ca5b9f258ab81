"""What each filter would drop if it were the only one, and how far two of them mean the same documents, by domain.

Known from a report alone (`--report-only`), where every filter is asked of every document: one that goes at an earlier
stage is asked on, with the text that a later stage would have seen had it stayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from moelab_tools.curate.account import Account

ALL = "all"
EXPLAINED = (
    "By itself: documents that the filter drops, whatever the others do; alone: that no other drops. Of two: how many "
    "both drop of those that either does, and Cohen's kappa of the two decisions, which is 1 where they are the same, "
    "0 where they agree as often as by chance, and not told where neither or both drop everything."
)


@dataclass(frozen=True)
class Agreement:
    """Of two filters in one domain, or in all that both are asked in."""

    first: str
    second: str
    domain: str
    documents: int  # that both were asked of
    first_drops: int
    second_drops: int
    both: int

    @property
    def either(self) -> int:
        return self.first_drops + self.second_drops - self.both

    @property
    def jaccard(self) -> float | None:
        """Share of those that either drops which both do."""
        return self.both / self.either if self.either else None

    @property
    def kappa(self) -> float | None:
        """(p_o - p_e) / (1 - p_e): agreement beyond that of two independent filters that drop as much (Cohen 1960)."""
        if not self.documents:
            return None
        first, second = self.first_drops / self.documents, self.second_drops / self.documents
        chance = first * second + (1 - first) * (1 - second)
        observed = 1 - (self.either - self.both) / self.documents
        return (observed - chance) / (1 - chance) if chance < 1 else None

    def __str__(self) -> str:
        if not self.either:
            return "0"
        kappa = "" if self.kappa is None else f", κ {self.kappa:.2f}".replace("-", "−")
        return f"{self.both:,} of {self.either:,}{kappa}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"jaccard": self.jaccard, "kappa": self.kappa}


def agreements(account: Account, stages: Sequence[str]) -> list[Agreement]:
    """Of every two filters that drop something: over all domains, then in each that both are asked in."""
    found = []
    for first, second in combinations(_dropping(account, stages), 2):
        shared = [name for name in account.domains if account.asked[first, name] and account.asked[second, name]]
        own = [_agreement(account, first, second, name) for name in shared]
        if own:
            sums = [sum(getattr(one, key) for one in own)
                    for key in ("documents", "first_drops", "second_drops", "both")]  # fmt: skip
            found += [Agreement(first, second, ALL, *sums), *own]
    return found


def agreement_lines(account: Account, stages: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(what, {column: cell}): of each filter, then of every two; [] where fewer than two drop anything."""
    names = _dropping(account, stages)
    if len(names) < 2:
        return []
    lines = []
    for name in names:
        alone = {domain: account.dropped_by[domain, (name,)] for domain in account.domains}
        for word, counts in (("by itself", _drops(account, name)), ("alone", alone)):
            cells = {domain: f"{counts[domain]:,}" for domain in account.domains if account.asked[name, domain]}
            lines.append((f"{name}: {word}", {ALL: f"{sum(counts.values()):,}"} | cells))
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for one in agreements(account, stages):
        pairs.setdefault((one.first, one.second), {})[one.domain] = str(one)
    return [*lines, *((f"{first}, {second}", cells) for (first, second), cells in pairs.items())]


def _dropping(account: Account, stages: Sequence[str]) -> list[str]:
    named = {name for _, names in account.dropped_by for name in names}
    return [name for name in stages if name in named]


def _drops(account: Account, stage: str) -> dict[str, int]:
    """{domain: documents that it drops, whatever others do}."""
    counts = dict.fromkeys(account.domains, 0)
    for (domain, names), count in account.dropped_by.items():
        counts[domain] += count * (stage in names)
    return counts


def _agreement(account: Account, first: str, second: str, domain: str) -> Agreement:
    both = sum(
        count
        for (own, names), count in account.dropped_by.items()
        if own == domain and first in names and second in names
    )
    drops, others = (_drops(account, name)[domain] for name in (first, second))
    return Agreement(first, second, domain, account.asked[first, domain], drops, others, both)
