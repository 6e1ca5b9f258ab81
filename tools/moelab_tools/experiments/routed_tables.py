"""How far runs kept the routes of what they began from, as Markdown: a row for each layer and domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelab.printable import printable

HEAD = (
    "Of {tokens:,} held-out tokens, at each run's end: the share of assignments, %, that `{against}` of the same seed "
    "makes too, mean over seeds with its {level:g} % interval; then the difference from `{baseline}` by pairs of "
    "seeds. By chance: what two routers of these loads would share, of `{baseline}`. A row's differences hold together "
    "in {level:g} % of such rows, and not over rows. The text is one for all, so intervals are about seeds alone; "
    "nothing is concluded from them."
)


def routes_section(findings: Mapping[str, Any], level: str = "##", *, short: bool = False) -> list[str]:
    """Lines; none where nothing was asked of routes. `short`: of all layers together alone."""
    found, baseline = findings.get("routes"), findings["baseline"]
    if not found or not found["table"]:
        return []
    error = findings["declaration"]["declared"]["protocol"]["error"]
    shown = {"tokens": found["tokens"], "against": found["against"], "baseline": baseline, "level": 100 * (1 - error)}
    variants = list(dict.fromkeys(name for row in found["table"] for name in row["variants"]))
    told = [f"{level} Routes, by layer and domain", "", HEAD.format(**shown), ""]
    told += [f"| layer | domain | documents | {' | '.join(variants)} | by chance |", "|---" * (len(variants) + 4) + "|"]
    last = found["table"][-1]["layer"]  # that of all layers, or the only one
    for row in found["table"]:
        if short and row["layer"] != last:
            continue
        ones = row["variants"]
        first = ones.get(baseline) or next(iter(ones.values()), None)
        if first is None:
            continue
        domain = "all" if row["domain"] is None else f"`{printable(row['domain'], 40)}`"
        cells = [row["layer"], domain, str(first["documents"]), *(_cell(ones.get(name)) for name in variants)]
        cells.append(_percent(ones[baseline]["chance"]) if baseline in ones else "–")
        told.append(f"| {' | '.join(cells)} |")
    return [*told, ""]


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    told = f"{_percent(one['share'])} [{_percent(one['share_low'])}, {_percent(one['share_high'])}]"
    if one.get("difference") is None:
        return told
    difference, low, high = (_percent(one.get(key), sign=True) for key in ("difference", "low", "high"))
    return f"{told}, {difference} [{low}, {high}]"


def _percent(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")
