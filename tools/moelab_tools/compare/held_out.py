"""What must be said of the held-out text before its loss is believed: who had seen it, and in which unit it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from moelab.data.seen import SeenText
from moelab_tools.compare.measure import BITS_PER_BYTE, NATS_PER_TOKEN, Measure
from moelab_tools.compare.runs import Document, Run


def seen_before(runs: Sequence[Run]) -> list[str]:
    """One sentence for each way in which starting weights have met, or may have met, what is scored; runs together."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for line in _lines(run):
            told.setdefault(line, []).append(run.name)
    return [f"{', '.join(names)}: {line}" for line, names in told.items()]


def _lines(run: Run) -> list[str]:
    data = run.summary.get("data")
    seen = data.get("seen") if isinstance(data, Mapping) else None
    source = (run.config.get("train") or {}).get("init_from")
    if isinstance(seen, Mapping):
        return _account(seen).lines()
    if source is None:
        return []
    return [f"held-out text may have been seen: the run does not record what {source} was trained on"]


def _account(seen: Mapping[str, Any]) -> SeenText:
    counts = {field.name: seen.get(field.name, 0) for field in fields(SeenText)}
    counts["unknown"] = tuple(map(str, seen.get("unknown") or ()))
    return SeenText(**counts)


def choose_measure(runs: Sequence[Run]) -> tuple[Measure, list[Run], list[str]]:
    """One unit for the whole comparison -> (it, the runs with the documents that it counts, why in a sentence).

    Bits per byte wherever every run knows bytes; documents of which some run doesn't are then left out of all runs.
    A document of which only its end was scored has no bytes, and that is known.
    """
    evaluated = [run for run in runs if run.documents]
    without = [run.name for run in evaluated if not _size(run.documents)]
    if without:
        why = f"the unit is nats per token, not bits per byte: no count of the text's bytes in {', '.join(without)}"
        return NATS_PER_TOKEN, list(runs), [why]
    unknown = {name for run in evaluated for name, document in run.documents.items() if document.bytes is None}
    if not unknown:
        return BITS_PER_BYTE, list(runs), []
    kept = [
        replace(run, documents={name: one for name, one in run.documents.items() if name not in unknown})
        for run in runs
    ]
    count = len({name for run in evaluated for name in run.documents})
    why = f"{len(unknown)} of {count} held-out documents (first '{min(unknown)}') have no count of bytes: left out"
    if any(not _size(after.documents) for after, run in zip(kept, runs, strict=True) if run.documents):
        return (
            NATS_PER_TOKEN,
            list(runs),
            [f"the unit is nats per token, not bits per byte: {why} nothing would be left"],
        )
    return BITS_PER_BYTE, kept, [f"{why} of bits per byte, in every run"]


def _size(documents: Mapping[str, Document]) -> int:
    return sum(document.bytes or 0 for document in documents.values())
