"""What runs made of longer texts, as Markdown: a table for each variant and moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

HEAD = (
    "Nats a token of those with at least the trained length before them (at 1x, and below: of all), by way and length; "
    "at the greatest length, against {baseline}: the difference, and a word. All words together are false in at most "
    "{error:g} % of such experiments; the intervals are those the words go by. *Moved*: the share of assignments that "
    "go to other experts beyond the trained length, mean over the layers. *Entropy*: of attention, nats, mean over the "
    "layers, in the last doubling of places. *Keys*: how many of the hidden numbers were given back, by length."
)


def lengths_section(findings: Mapping[str, Any], level: str = "##") -> list[str]:
    """Lines; none where nothing was asked of lengths."""
    found, asked = findings.get("lengths"), findings["declaration"]["declared"].get("lengths")
    if not found or not asked:
        return []
    error = 100 * findings["declaration"]["declared"]["protocol"]["error"]
    told = [f"{level} Longer texts", "", f"**{asked['question']}**", ""]
    told += [f"- {word}: {text}" for word, text in asked["decision"].items()]
    told += ["", HEAD.format(baseline=f"`{asked['baseline']}`", error=error)]
    for variant, moments in found.items():
        for moment, one in moments.items():
            told += ["", f"{level}# {variant}, {moment}: trained on {one['trained']} tokens", ""]
            told += [*_table(one, asked), ""]
            told += [*_by_word(one), *_within(one, asked["baseline"])]
    return told


def lengths_in_short(findings: Mapping[str, Any]) -> str:
    """How many ways got which word, over all variants and moments; empty where nothing was asked."""
    ends = [
        max(one["lengths"], key=lambda each: each["length"])["ways"]
        for moments in (findings.get("lengths") or {}).values()
        for one in moments.values()
    ]
    words = Counter(way["verdict"] for ways in ends for way in ways.values() if "verdict" in way)
    if not words:
        return ""
    told = ", ".join(f"{count} {word}" for word, count in words.most_common())
    baseline = findings["declaration"]["declared"]["lengths"]["baseline"]
    return f"; ways of reaching, of {words.total()}: {told} (than {baseline})"


def _table(one: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    lengths, trained = one["lengths"], one["trained"]
    last = max(lengths, key=lambda each: each["length"])
    experts = any(way["moved"] is not None for way in last["ways"].values())
    heads = ["way", *(f"{each['length'] / trained:g}x" for each in lengths)]
    heads += [f"{last['length'] / trained:g}x, % [interval]", "word", *(["moved"] if experts else []), "entropy"]
    heads += ["keys"] if asked["passkey"] else []
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in last["ways"]:
        end = last["ways"][name]
        cells = [name, *(f"{each['ways'][name]['loss']:.4f}" for each in lengths)]
        cells += ["baseline", ""] if "verdict" not in end else [_interval(end), end["verdict"]]
        cells += [_number(end["moved"], 3)] if experts else []
        cells += [_number(end["entropy"], 2)]
        if asked["passkey"]:
            cells += [", ".join(str(each["ways"][name]["keys"]["found"]) for each in lengths)
                      + f" of {end['keys']['of']}"]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _by_word(one: Mapping[str, Any]) -> list[str]:
    """A line for each conclusion, with the ways that it holds of."""
    last = max(one["lengths"], key=lambda each: each["length"])["ways"]
    names: dict[str, list[str]] = {}
    for name, way in last.items():
        if "concluded" in way:
            names.setdefault(way["concluded"], []).append(name)
    return [f"- {', '.join(ways)}: {concluded}" for concluded, ways in names.items()]


def _within(one: Mapping[str, Any], baseline: str) -> list[str]:
    """Beside what moves beyond the trained length, what moves within it; nothing without experts."""
    moved = one["lengths"][0]["ways"][baseline]["moved_within"]
    if moved is None:
        return []
    return [f"- of assignments, {moved:.3f} move from the first half of the trained length to its second"]


def _interval(way: Mapping[str, Any]) -> str:
    numbers = [way[f"{key}_percent"] for key in ("difference", "low", "high")]
    middle, low, high = ("–" if one is None else f"{one:+.2f}".replace("-", "−") for one in numbers)
    return f"{middle} [{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
