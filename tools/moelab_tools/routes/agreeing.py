"""The table of `moelab agreement`: equal assignments by layer, beside chance and beside the best naming of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moelab.routes.agreement import LayerAgreement
from moelab_tools.routes.intervals import Estimate, estimates

HEAD = f"{'layer':>5}  {'equal assignments, %':<26}{'same top expert':>16}{'by chance':>11}{'renamed':>10}"


@dataclass(frozen=True)
class Row:
    """One layer, or all together."""

    layer: str
    equal: Estimate
    same_top: Estimate
    chance: float
    renamed: float  # the share, had the experts of one trace been numbered to fit the other's best

    def told(self) -> str:
        equal, half = 100 * self.equal.value, self.equal.half
        interval = (
            "[one document]" if half is None else f"[{equal - 100 * half:.2f}, {min(100.0, equal + 100 * half):.2f}]"
        )
        return (
            f"{self.layer:>5}  {f'{equal:.2f} {interval}':<26}{100 * self.same_top.value:>14.2f} %"
            f"{100 * self.chance:>9.1f} %{100 * self.renamed:>8.1f} %"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer, "equal": self.equal.to_json(), "same_top": self.same_top.to_json(),
            "chance": self.chance, "renamed": self.renamed,
        }  # fmt: skip


def rows(found: Sequence[LayerAgreement]) -> list[Row]:
    """A row a layer, and where there are several one of all."""
    made = [_row(str(one.layer_id), [one]) for one in found]
    return made if len(found) == 1 else [*made, _row("all", found)]


def _row(name: str, layers: Sequence[LayerAgreement]) -> Row:
    equal, wanted, top, tokens = (
        np.sum([getattr(one, key) for one in layers], axis=0) for key in ("equal", "wanted", "same_top", "tokens")
    )
    weight = np.array([one.wanted.sum() for one in layers])
    return Row(
        name,
        estimates(equal[None], wanted)[0],
        estimates(top[None], tokens)[0],
        float(np.average([one.chance for one in layers], weights=weight)),
        float(np.average([_renamed(one) for one in layers], weights=weight)),
    )


def _renamed(one: LayerAgreement) -> float:
    rows_, columns = linear_sum_assignment(one.together, maximize=True)
    return float(one.together[rows_, columns].sum() / max(one.wanted.sum(), 1))
