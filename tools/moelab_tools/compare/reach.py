"""What `moelab evaluate --length` kept in the compared runs: charts of a variant each, in which a line is a way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab_tools.compare.bands import short
from moelab_tools.compare.charts import COLOURS, PALE, Cast, Chart, Section, label
from moelab_tools.lengths.kept import of_run

Kept = Mapping[str, Any]
Read = Callable[[Mapping[str, Any]], Mapping[str, float]]  # of one length: {where on the axis: value}
TEXT = (
    "What moelab evaluate --length kept of each run's newest checkpoint that was looked at so. A line is a way of "
    "reaching beyond the trained length, weights as they are. Lines are means over seeds, bands run from the lowest to "
    "the highest."
)


def longer_texts(cast: Cast) -> Section:
    """The loss of each main variant in view, what else was measured folded away."""
    shown: list[Chart] = []
    folded: list[Chart] = []
    for place, line in enumerate(cast.lines):
        found = charts_of(*(run.path for run in cast.counted(line)), name=f"longer-{place}", title=label(line.name))
        if not found:
            continue
        (first, *rest) = found
        (shown if cast.is_main(place) else folded).append(first)
        folded += rest
    return Section("Longer texts", TEXT, shown, folded, each="chart")


def charts_of(*runs: Path, name: str = "longer", title: str = "") -> list[Chart]:
    """Of the runs of one variant, by their newest checkpoint that was looked at, where it is the same in all."""
    newest = [found[-1] for run in runs if (found := of_run(run))]
    alike = [kept for step, kept in newest if step == newest[0][0] and kept["text"] == newest[0][1]["text"]]
    return _charts(alike, name, title) if alike else []


def _charts(kept: Sequence[Kept], name: str, title: str) -> list[Chart]:
    longest = max(one["length"] for way in kept[0]["ways"].values() for one in way)
    trained = kept[0]["trained"]
    note = f"{title}: trained on {trained} tokens, read {longest}"
    place, tokens = "tokens before the target", "tokens of the text"
    by_place: list[tuple[str, str, str, Read]] = [
        ("loss", "Loss by place", "nats per token", lambda one: one["positions"]),
        ("entropy", "Entropy of attention", "nats, mean over layers", lambda one: _over_layers(one["entropy"])),
        ("drift", "Assignments that move", "share, mean over layers", lambda one: _over_layers(one["drift_by_place"])),
    ]
    found = [
        _chart(
            f"{name}-{key}",
            (what, note),
            (place, unit),
            _lines(kept, lambda one: one["length"] == longest, read),
            zero=key == "drift",
        )
        for key, what, unit, read in by_place
    ]
    by_length: list[tuple[str, str, str, Read]] = [
        ("beyond", "Loss beyond the trained length", "nats per token", lambda one: _at(one, one["beyond"])),
        ("passkey", "Keys given back", "share", lambda one: _at(one, _found(one))),
    ]
    found += [
        _chart(f"{name}-{key}", (what, note), (tokens, unit), _lines(kept, lambda _: True, read), zero=key == "passkey")
        for key, what, unit, read in by_length
    ]
    return found


def _chart(
    name: str, told: tuple[str, str], axes: tuple[str, str], lines: list[dict[str, Any]], *, zero: bool
) -> Chart:
    """Without data where there are no lines."""
    (title, note), (axis, unit) = told, axes
    lists = [line.pop("names") for line in lines]
    shared = sorted(lists, key=len)[-1] if lists else []
    shapes = [names for i, names in enumerate(lists) if names not in lists[:i]]
    for line, names in zip(lines, lists, strict=True):
        line["x"] = shapes.index(names)
    data = {"lines": lines, "xs": shapes, "x": axis, "unit": unit, "marks": True, "zero": zero, "view": None,
            "names": shared} if lines else {}  # fmt: skip
    return Chart(name, "curves", title, f"{note}; {unit}", data)


def _lines(kept: Sequence[Kept], chosen: Callable[[Mapping[str, Any]], bool], read: Read) -> list[dict[str, Any]]:
    """One a way: means over runs, where each has a value."""
    lines: list[dict[str, Any]] = []
    for number, way in enumerate(kept[0]["ways"]):
        read_runs: list[dict[str, float]] = []
        for one in kept:
            values: dict[str, float] = {}
            for length in one["ways"].get(way, ()):
                if chosen(length):
                    values |= read(length)
            read_runs.append(values)
        names = [name for name in read_runs[0] if all(name in values for values in read_runs)]
        if not names:
            continue
        columns = [[values[name] for values in read_runs] for name in names]
        colour = COLOURS[number] if number < len(COLOURS) else PALE
        line: dict[str, Any] = {
            "v": number,
            "own": {"name": label(way), "colour": colour, "main": colour != PALE},
            "names": [_spelled(name) for name in names],
            "y": [short(sum(column) / len(column)) for column in columns],
        }
        if len(kept) > 1:
            line |= {key: [short(end(column)) for column in columns] for key, end in (("low", min), ("high", max))}
        lines.append(line)
    return lines


def _over_layers(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{layer: {place: value}} -> means over the layers."""
    if not layers:
        return {}
    every = list(layers.values())
    return {
        name: sum(one[name] for one in every) / len(every) for name in every[0] if all(name in one for one in every)
    }


def _at(one: Mapping[str, Any], value: float | None) -> dict[str, float]:
    return {} if value is None else {str(one["length"]): value}


def _found(one: Mapping[str, Any]) -> float | None:
    shares = one["passkey"]
    return sum(shares.values()) / len(shares) if shares else None


def _spelled(name: str) -> str:
    """`004-007` -> `4–7`."""
    return "–".join(str(int(end)) if end.isdecimal() else end for end in name.split("-"))
