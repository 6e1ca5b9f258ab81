"""The held-out loss of one checkpoint with 95 % intervals over documents: of all text, by domain and by place.

An interval says how the figure would move with other documents of the same kinds, for these very weights: it covers no
training seed, and two checkpoints whose intervals overlap may still differ clearly document by document, which is what
`moelab compare` looks at. It is the jackknife's (`compare.contrast`), since the loss is a ratio of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moelab.printable import printable
from moelab.training.evaluation import Evaluation, Sums
from moelab_tools.compare.contrast import over_pairs
from moelab_tools.compare.measure import BITS_PER_BYTE, NATS_PER_TOKEN, Measure

FEW = 20  # documents: an interval from fewer is rough
WHOLE = "all"
HEADINGS = {
    WHOLE: "all held-out text",
    "domain": "by domain",
    "position": "by tokens before the target in its sequence",
    "context": "by tokens of its own document before the target",
}


@dataclass(frozen=True)
class Level:
    """Held-out loss of some text, in the measure's unit."""

    value: float
    low: float | None  # of the 95 % interval; None below two documents
    high: float | None
    documents: int
    tokens: int


def measure_of(evaluation: Evaluation) -> Measure:
    """Bits per byte where every document's bytes are counted."""
    counted = evaluation.exact_bytes and evaluation.bits_per_byte() is not None
    return BITS_PER_BYTE if counted else NATS_PER_TOKEN


def level(sums: Sums, measure: Measure) -> Level | None:
    """None where there is nothing to divide by: text of which only ends of documents were scored has no bytes."""
    read = sums.tokens > 0
    size = sums.bytes if measure is BITS_PER_BYTE else sums.tokens
    if size is None or not size[read].sum() > 0:
        return None
    found = over_pairs(sums.nats[None, read] * measure.per_nat, size[read])
    value, half = float(found.difference), float(found.text_half())
    known = half > 0  # one document says nothing of another
    return Level(
        value,
        max(value - half, 0.0) if known else None,  # no loss is negative
        value + half if known else None,
        int(read.sum()),
        int(sums.tokens[read].sum()),
    )


def levels(evaluation: Evaluation, domain_of: Sequence[str]) -> dict[str, dict[str, Level]]:
    """{"all", "domain", "position", "context"} -> name -> its level; domain_of: the domain of each document."""
    measure = measure_of(evaluation)
    parts: dict[str, Mapping[str, Sums]] = {
        WHOLE: {WHOLE: evaluation}, "domain": evaluation.by_domain(domain_of), **evaluation.places,
    }  # fmt: skip
    found = {kind: {name: level(sums, measure) for name, sums in part.items()} for kind, part in parts.items()}
    return {kind: {name: one for name, one in part.items() if one is not None} for kind, part in found.items()}


def lines(found: Mapping[str, Mapping[str, Level]], measure: Measure) -> list[str]:
    """As a terminal shows them."""
    names = {name: printable(name, 60) for part in found.values() for name in part}
    width = max(map(len, names.values()))
    levels = [one for part in found.values() for one in part.values()]
    texts, tokens = (
        max(len(f"{count:,}") for count in counts)
        for counts in ([one.documents for one in levels], [one.tokens for one in levels])
    )
    told = [f"{measure.name} [95 % interval over documents]"]
    for kind, part in found.items():
        told.append(f"{HEADINGS[kind]}:")
        for name, one in part.items():
            interval = "" if one.low is None or one.high is None else f"[{one.low:.4f}, {one.high:.4f}]"
            rough = "  few documents" if one.documents < FEW else ""
            noun = "document" if one.documents == 1 else "documents"
            told.append(
                f"  {names[name]:<{width}}  {one.value:8.4f}  {interval:<16}  {one.documents:>{texts},} {noun:<9}  "
                f"{one.tokens:>{tokens},} tokens{rough}"
            )
    return told
