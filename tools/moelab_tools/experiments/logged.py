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
from moelab_tools.compare.pairing import Losses, match
from moelab_tools.compare.runs import Run
from moelab_tools.compare.verdict import Rules, decide

HEAD = (
    "Names as in docs/metrics.md; a pattern is the mean of the names that it fits, run by run. The mean of a run's "
    "first {first} and last {last} values, over seeds; at the end the difference from {baseline}, by pairs of seeds. "
    "A row's intervals hold together in {level:g} % of such rows, and not over rows; nothing is concluded from them."
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
    """{name: {variant: numbers}}, for findings.json; a name that no run has is left out.

    A pattern that fits several names stands before them, as the mean over them.
    """
    known = {tag for ones in runs.values() for run in ones for row in run.rows for tag in row}
    rows: dict[str, list[str]] = {}
    for pattern in asked.names:
        names = [tag for tag in sorted(known) if fnmatchcase(tag, pattern)]
        rows |= {pattern: names} if len(names) > 1 else {}
        rows |= {name: [name] for name in names}
    return {name: _row(asked, names, runs, baseline, error) for name, names in rows.items()}


def _row(
    asked: Logged, names: Sequence[str], runs: Mapping[str, Sequence[Run]], baseline: str, error: float
) -> dict[str, Any]:
    both = {variant: {run.seed: ends for run in ones if (ends := _ends(asked, names, run)) is not None}
            for variant, ones in runs.items()}  # fmt: skip
    both = {variant: one for variant, one in both.items() if one}
    at_end = {variant: {seed: last for seed, (_, last) in one.items()} for variant, one in both.items()}
    contrasts = differences(at_end, baseline, error)
    found: dict[str, Any] = {}
    for variant, one in both.items():
        first, last = np.array([*one.values()]).T
        found[variant] = {
            "seeds": len(last),
            "names": len(names),
            "first": float(first.mean()),
            "last": float(last.mean()),
            "sd_over_seeds": float(last.std(ddof=1)) if len(last) > 1 else None,
        }
        found[variant] |= contrasts.get(variant, {})
    return found


def differences(values: Mapping[str, Mapping[Any, float]], baseline: str, error: float) -> dict[str, dict[str, Any]]:
    """values {variant: {seed: number}} -> {variant: difference from the baseline with its interval} of all others.

    By pairs of seeds where there are any; the intervals hold together. Empty where the baseline has no values.
    """
    if baseline not in values or len(values) < 2:
        return {}
    losses = {variant: Losses(tuple(one), np.array([*one.values()])[:, None], np.ones(1))
              for variant, one in values.items()}  # fmt: skip
    # Without `judge`, which counts runs of the same result once: two seeds may well log the same share, or none.
    matched = {variant: match(one, losses[baseline]) for variant, one in losses.items() if variant != baseline}
    verdicts = decide(matched, abs(losses[baseline].score), Rules(True, 0.0, error=error))
    keys = ("difference", "low", "high", "could_have_seen")
    return {variant: {key: getattr(verdict, key) for key in keys} for variant, verdict in verdicts.items()}


def _ends(asked: Logged, names: Sequence[str], run: Run) -> tuple[float, float] | None:
    """(beginning, end) of a run, as the mean over names; None where it lacks one of them."""
    curves = [run.curve(name)[1] for name in names]
    if not all(curves):
        return None
    return (
        float(np.mean([np.mean(values[: asked.first]) for values in curves])),
        float(np.mean([np.mean(values[-asked.last :]) for values in curves])),
    )


def logged_in_short(findings: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: of what was declared a row, a variant a column; what a pattern fits stands in the reading."""
    found, declared = findings.get("logged"), findings["declaration"]["declared"].get("logged")
    if not found or not declared:
        return []
    variants = [name for name in findings["variants"] if any(name in one for one in found.values())]
    told = [
        f"Logged, first → last, and the last's difference from `{findings['baseline']}` with its interval; no words:",
        "", f"| what | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|",
    ]  # fmt: skip
    for name in declared["names"]:
        row = found.get(name) or _mean_row(name, found, findings["baseline"])
        if not row:
            continue
        counts = {one.get("names", 1) for one in row.values()}
        what = f"`{name}`" if counts == {1} else f"`{name}`, mean of {max(counts)}"
        told.append(f"| {what} | {' | '.join(_in_short(row.get(variant)) for variant in variants)} |")
    return told if len(told) > 4 else []


def _mean_row(pattern: str, found: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """{variant: numbers} over the names that a pattern fits, of findings that have no row of it: without an interval.

    A variant that lacks one of the names is left out.
    """
    fitting = [row for name, row in found.items() if fnmatchcase(name, pattern)]
    whole = [variant for variant in (fitting[0] if fitting else ()) if all(variant in row for row in fitting)]
    means = {
        variant: {"names": len(fitting)}
        | {key: float(np.mean([row[variant][key] for row in fitting])) for key in ("first", "last")}
        for variant in whole
    }
    for variant in [one for one in whole if one != baseline and baseline in means]:
        means[variant]["difference"] = means[variant]["last"] - means[baseline]["last"]
    return means


def _in_short(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    told = f"{_number(one['first'])} → {_number(one['last'])}"
    if one.get("difference") is None:
        return told
    difference, low, high = (_number(one.get(key), sign=True) for key in ("difference", "low", "high"))
    return f"{told}, {difference} [{low}, {high}]" if "low" in one else f"{told}, {difference}"


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
            cells = [f"`{name}`", variant, *(_number(one[key]) for key in ("first", "last", "sd_over_seeds"))]
            difference, low, high = (_number(one.get(key), sign=True) for key in ("difference", "low", "high"))
            cells += ["baseline", ""] if variant == baseline else [
                f"{difference} [{low}, {high}]", _number(one.get("could_have_seen"))
            ]  # fmt: skip
            told.append(f"| {' | '.join(cells)} |")
    return [*told, ""]


def _number(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.4f}".replace("-", "−")
