"""How `moelab runs` shows records: a line each, what tells a run from the others behind it or, in 80 columns, below."""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from moelab.config.differing import commonest, differing, short_keys, shown
from moelab.printable import printable
from moelab.run_table.frame import alarm_words
from moelab.run_table.record import DAMAGED, FAILED, FINISHED, KILLED, RUNNING, STATES, RunRecord

MISSING = "–"
COLUMNS = ("run", "state", "step", "loss", "bits/byte", "age")
LEFT = 2  # of them are texts; the rest are numbers
STYLES = {RUNNING: "cyan", FINISHED: "green", FAILED: "red", KILLED: "red", DAMAGED: "red"}
WIDE, PIPE = 130, 100_000  # columns from which a run takes one line; a pipe has no end
MOST_KEYS, LONGEST_NAME, LONGEST_REASON = 8, 44, 160


@dataclass(frozen=True)
class Row:
    """One run's cells, and what is told of it beside them."""

    record: RunRecord
    cells: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]  # (style, text)


def print_runs(records: Sequence[RunRecord], console: Console, *, now: float | None = None) -> None:
    """The table, and a line that counts. `now`: seconds since 1970."""
    width = console.width if console.is_terminal else PIPE
    rows, common = _rows(records, time.time() if now is None else now)
    widths = [max(len(row.cells[i]) for row in [Row(records[0], COLUMNS, ()), *rows]) for i in range(len(COLUMNS))]
    behind = sum(widths) + 2 * len(widths)
    indent = behind if width >= WIDE else 4
    console.print(Text(_line(COLUMNS, widths), style="bold"), soft_wrap=True)
    for row in rows:
        line = Text(_line(row.cells, widths))
        line.stylize(STYLES.get(row.record.state, "yellow"), widths[0] + 2, widths[0] + 2 + widths[1])
        pieces = list(_pieces(row.notes, max(20, width - indent - 1)))
        if indent == behind and pieces:
            line.append_text(Text(" " * (behind - len(line)))).append_text(pieces.pop(0))
        console.print(line, soft_wrap=True)
        for piece in pieces:
            console.print(Text(" " * indent).append_text(piece), soft_wrap=True)
    if common:
        text = f"where a key does not stand: {common}"
        for part in textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False):
            console.print(Text(part, style="dim"), soft_wrap=True)
    console.print(counted(records), soft_wrap=True)


def counted(records: Sequence[RunRecord]) -> str:
    """`3 runs: 1 running, 2 finished`."""
    states = Counter(record.state for record in records)
    listed = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    return f"{len(records)} run{'s' if len(records) != 1 else ''}: {listed}"


def as_json(records: Sequence[RunRecord], now: float) -> list[dict[str, Any]]:
    """Every field, the age, and the keys that differ; what is no finite number is null."""
    listed = []
    for record, differs in zip(records, differing([r.config for r in records]), strict=True):
        fields = asdict(record) | {"path": str(record.path), "age_seconds": round(now - record.updated, 1)}
        fields["alarms"] = [{"name": name, "layer": layer} for name, layer in record.alarms]
        listed.append(_finite(fields | {"differs": differs}))
    return listed


def age(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `5 d`: how long ago, rounded down."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _rows(records: Sequence[RunRecord], now: float) -> tuple[list[Row], str]:
    """The rows, and what most of them have at the keys in which they differ; it does not stand in theirs."""
    differences = differing([record.config for record in records])
    common = commonest(differences)
    keys = sorted(dict.fromkeys(key for one in differences for key in one), key=_telling)
    short = short_keys(keys)
    rows = []
    for record, one in zip(records, differences, strict=True):
        own = [key for key in keys if key in one and (key not in common or one[key] != common[key])]
        name = printable(os.fspath(record.path), LONGEST_NAME)  # as the next command takes it
        rows.append(
            Row(record, _cells(record, name, now), tuple(_notes(record, [_pair(short[k], one[k]) for k in own])))
        )
    return rows, _pairs([_pair(short[key], common[key]) for key in keys if key in common])


def _telling(key: str) -> tuple[bool, bool]:
    """What says most comes first: which parts, which seed, then numbers."""
    return not key.endswith((".name", ".moe", ".balance_losses", ".layers")), not key.endswith("seed")


def _pair(key: str, value: Any) -> str:
    return f"{key}={shown(value)}"


def _pairs(pairs: Sequence[str]) -> str:
    more = [f"and {len(pairs) - MOST_KEYS} more"] if len(pairs) > MOST_KEYS else []
    return "  ".join([*pairs[:MOST_KEYS], *more])


def _cells(record: RunRecord, name: str, now: float) -> tuple[str, ...]:
    step = MISSING if record.step is None else f"{record.step:,}"
    of = (
        ""
        if record.steps is None or (record.step == record.steps and record.state == FINISHED)
        else f"/{record.steps:,}"
    )
    return (
        name, record.state, f"{step}{of}", _number(record.loss), _number(record.bits_per_byte),
        age(now - record.updated) if record.updated else MISSING,
    )  # fmt: skip


def _notes(record: RunRecord, pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    if pairs:
        yield "dim", _pairs(pairs)
    if record.alarms:
        yield "yellow", f"alarm: {alarm_words(record)}"
    for reason in filter(None, (record.error, record.problem)):
        yield "red", printable(" ".join(reason.split()), LONGEST_REASON)


def _pieces(notes: Sequence[tuple[str, str]], width: int) -> Iterator[Text]:
    for style, text in notes:
        for line in textwrap.wrap(text, width, break_on_hyphens=False):
            yield Text(line, style=style)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [c.ljust(w) if i < LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(padded).rstrip()


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
