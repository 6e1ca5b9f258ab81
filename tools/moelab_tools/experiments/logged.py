"""`logged` of an experiment: what runs log beside their loss, by variant, at their beginning and at their end.

Facts beside the verdict, with intervals over seeds: they get no word, and what is concluded rests on the loss alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from moelab.errors import ConfigError
from moelab_tools.compare.pairing import Losses
from moelab_tools.compare.runs import Run
from moelab_tools.compare.verdict import Rules, judge

HEAD = (
    "Names as in docs/metrics.md: the mean of a run's first {first} and last {last} values, over seeds; the difference "
    "at the end against {baseline}, by pairs of seeds. The intervals of a row hold together in {level:g} % of such "
    "rows, and not over rows; nothing is concluded from them."
)


@dataclass
class Logged:
    """Which names of metrics.jsonl are told."""

    names: list[str] = field(default_factory=list)  # patterns such as moe/layer_*/route_agreement too
    first: int = 1  # values whose mean is the beginning
    last: int = 1  # and the end

    def check(self) -> None:
        """Raise ConfigError naming the key."""
        if not self.names or min(self.first, self.last) < 1:
            raise ConfigError("logged: give names of what is logged, and first and last of at least 1")


def logged(asked: Logged, runs: Mapping[str, Sequence[Run]], baseline: str, error: float) -> dict[str, Any]:
    """{name: {variant: numbers}}, for findings.json; a name that no run has is left out."""
    known = {tag for ones in runs.values() for run in ones for row in run.rows for tag in row}
    names = [tag for pattern in asked.names for tag in sorted(known) if fnmatchcase(tag, pattern)]
    return {name: _row(asked, name, runs, baseline, error) for name in dict.fromkeys(names)}


def _row(asked: Logged, name: str, runs: Mapping[str, Sequence[Run]], baseline: str, error: float) -> dict[str, Any]:
    curves = {variant: {run.seed: run.curve(name)[1] for run in ones} for variant, ones in runs.items()}
    curves = {variant: {seed: ys for seed, ys in one.items() if ys} for variant, one in curves.items()}
    curves = {variant: one for variant, one in curves.items() if one}
    ends = {variant: {seed: float(np.mean(ys[-asked.last :])) for seed, ys in one.items()}
            for variant, one in curves.items()}  # fmt: skip
    verdicts = {}
    if baseline in ends and len(ends) > 1:
        losses = {variant: Losses(tuple(one), np.array([*one.values()])[:, None], np.ones(1))
                  for variant, one in ends.items()}  # fmt: skip
        verdicts = judge(losses, baseline, Rules(True, 0.0, error=error))
    found: dict[str, Any] = {}
    for variant, one in ends.items():
        values = np.array([*one.values()])
        begins = [float(np.mean(ys[: asked.first])) for ys in curves[variant].values()]
        found[variant] = {
            "seeds": len(values),
            "first": float(np.mean(begins)),
            "last": float(values.mean()),
            "sd_over_seeds": float(values.std(ddof=1)) if len(values) > 1 else None,
        }
        if variant in verdicts:
            verdict = verdicts[variant]
            found[variant] |= {key: getattr(verdict, key) for key in ("difference", "low", "high", "could_have_seen")}
    return found


def logged_section(findings: Mapping[str, Any], level: str = "##") -> list[str]:
    """Lines of Markdown; none where nothing was asked."""
    found, declared = findings.get("logged"), findings["declaration"]["declared"]
    if not found:
        return []
    asked, baseline = declared["logged"], findings["baseline"]
    told = [f"{level} Logged", ""]
    shown = {"first": asked["first"], "last": asked["last"], "baseline": f"`{baseline}`"}
    told += [HEAD.format(level=100 * (1 - declared["protocol"]["error"]), **shown), ""]
    heads = ("what", "variant", "first", "last", "sd over seeds", "difference [interval]", "could have seen")
    told += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, variants in found.items():
        for variant, one in variants.items():
            cells = [name, variant, *(_number(one[key]) for key in ("first", "last", "sd_over_seeds"))]
            difference, low, high = (_number(one.get(key), sign=True) for key in ("difference", "low", "high"))
            cells += ["baseline", ""] if variant == baseline else [
                f"{difference} [{low}, {high}]", _number(one.get("could_have_seen"))
            ]  # fmt: skip
            told.append(f"| {' | '.join(cells)} |")
    return [*told, ""]


def _number(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.4f}".replace("-", "−")
