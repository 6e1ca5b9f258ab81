"""The tables of `moelab agreement`: equal assignments by layer and domain, beside chance and renamed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moelab.printable import printable
from moelab.routes.agreement import LayerAgreement
from moelab.routes.trace import Trace
from moelab_tools.routes.intervals import Estimate, estimates

HEAD = f"{'layer':>5}  {'equal assignments, %':<26}{'same top expert':>16}{'by chance':>11}{'renamed':>10}"
HEAD_BY_DOMAIN = f"{'layer':>5}  {'equal assignments, %':<26}{'same top expert':>16}{'by chance':>11}"
LONGEST_DOMAIN = 60  # characters of its name
ALL = "all"  # layers


@dataclass(frozen=True)
class Part:
    """Of a layer's tokens, or of all layers', those of some documents."""

    equal: Estimate
    same_top: Estimate
    chance: float

    def told(self) -> str:
        equal, half = 100 * self.equal.value, self.equal.half
        interval = (
            "[one document]"
            if half is None
            else f"[{max(0.0, equal - 100 * half):.2f}, {min(100.0, equal + 100 * half):.2f}]"
        )
        return f"{f'{equal:.2f} {interval}':<26}{100 * self.same_top.value:>14.2f} %{100 * self.chance:>9.1f} %"

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.equal.to_json(), "same_top": self.same_top.to_json(), "chance": self.chance}


@dataclass(frozen=True)
class Row:
    """One layer, or all together."""

    layer: str
    whole: Part
    renamed: float  # the share, had the experts of one trace been numbered to fit the other's best
    by_domain: dict[str, Part]  # of every domain that has assignments here

    def told(self) -> str:
        return f"{self.layer:>5}  {self.whole.told()}{100 * self.renamed:>8.1f} %"

    def to_json(self) -> dict[str, Any]:
        by_domain = {domain: part.to_json() for domain, part in self.by_domain.items()}
        return {"layer": self.layer} | self.whole.to_json() | {"renamed": self.renamed, "by_domain": by_domain}


def rows(found: Sequence[LayerAgreement], trace: Trace) -> list[Row]:
    """A row a layer, and where there are several one of all. `trace`: either of the two, for its documents' domains."""
    made = [_row(str(one.layer_id), [one], trace) for one in found]
    return made if len(found) == 1 else [*made, _row(ALL, found, trace)]


def told_by_domain(found: Sequence[Row]) -> list[str]:
    """Lines, a domain's layers together; none of a text of one domain, of which the rows tell."""
    domains = sorted({domain for row in found for domain in row.by_domain})
    if len(domains) < 2:
        return []
    names = {domain: printable(domain)[:LONGEST_DOMAIN] for domain in domains}
    width = max(16, *map(len, names.values()))
    lines = [
        f"{names[domain]:<{width}}  {row.layer:>5}  {row.by_domain[domain].told()}"
        for domain in domains
        for row in found
        if domain in row.by_domain
    ]
    return ["", f"{'domain':<{width}}  {HEAD_BY_DOMAIN}", *lines]


def _row(name: str, layers: Sequence[LayerAgreement], trace: Trace) -> Row:
    domain, wanted = trace.domain_of_documents(), np.sum([one.wanted for one in layers], axis=0)
    masks = {name: domain == place for place, name in enumerate(trace.domains)}
    return Row(
        name,
        _part(layers, np.ones(len(domain), bool)),
        float(np.average([_renamed(one) for one in layers], weights=[one.wanted.sum() for one in layers])),
        {name: _part(layers, mask) for name, mask in masks.items() if wanted[mask].any()},
    )


def _part(layers: Sequence[LayerAgreement], documents: np.ndarray) -> Part:
    equal, wanted, top, tokens = (
        np.sum([getattr(one, key)[documents] for one in layers], axis=0)
        for key in ("equal", "wanted", "same_top", "tokens")
    )
    weight = [one.wanted[documents].sum() for one in layers]
    return Part(
        estimates(equal[None], wanted)[0],
        estimates(top[None], tokens)[0],
        float(np.average([one.chance(documents) for one in layers], weights=weight)),
    )


def _renamed(one: LayerAgreement) -> float:
    rows_, columns = linear_sum_assignment(one.together, maximize=True)
    return float(one.together[rows_, columns].sum() / max(one.wanted.sum(), 1))
