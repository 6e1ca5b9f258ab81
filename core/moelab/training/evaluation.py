"""What an evaluation found: sums over held-out tokens by document, and beside that by place.

n documents that were scored, P places. A target's place is counted in two ways, both in bins of powers of two:
`position`, the tokens that stand before it in its sequence, and `context`, those among them of its own document, which
is what a model can go by where documents follow each other in one sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST_DOMAINS = 32  # that are logged one by one: those with most held-out tokens


@dataclass(frozen=True)
class Sums:
    """Of some held-out tokens, by document: all [n] float64."""

    nats: Floats
    tokens: Floats
    bytes: Floats | None  # None where the tokenizer's bytes are not known

    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    def bits_per_byte(self) -> float | None:
        """None where there is no byte to count by."""
        if self.bytes is None or not self.bytes.sum() > 0:
            return None
        return float(self.nats.sum() / self.bytes.sum() / math.log(2))


@dataclass(frozen=True)
class Evaluation(Sums):
    """All held-out tokens, each counted once."""

    exact_bytes: bool = True  # False: tokens times an average, which holds for all documents together only
    places: Mapping[str, Mapping[str, Sums]] = field(default_factory=dict)  # "position" or "context" -> bin -> sums

    def metrics(self) -> dict[str, float]:
        """`eval/loss` in nats a token, `eval/perplexity`, and `eval/bits_per_byte`, which any tokenizers share."""
        loss, bits = self.loss(), self.bits_per_byte()
        found = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        return found if bits is None else found | {"eval/bits_per_byte": bits}

    def detail(self, documents: tuple[Sequence[str], Sequence[str]]) -> dict[str, float]:
        """`eval_domain/<unit>/<domain>`, `eval_position/<unit>/<bin>`, `eval_context/<unit>/<bin>`.

        The unit is bits_per_byte where each document's bytes are counted, else loss. Of many domains the largest.
        """
        domains = self.by_domain(documents[1])
        largest = sorted(domains, key=lambda name: -domains[name].tokens.sum())[:MOST_DOMAINS]
        parts: dict[str, Mapping[str, Sums]] = {"domain": {name: domains[name] for name in sorted(largest)}}
        found = {}
        for kind, sums in (parts | dict(self.places)).items():
            for name, one in sums.items():
                bits = one.bits_per_byte() if self.exact_bytes else None
                unit, value = ("loss", one.loss()) if bits is None else ("bits_per_byte", bits)
                found[f"eval_{kind}/{unit}/{name}"] = value
        return found

    def by_domain(self, domain_of: Sequence[str]) -> dict[str, Sums]:
        """domain_of [n] -> the sums of each domain that was read; documents of others have none."""
        names = np.array(domain_of, dtype=object)
        read = self.tokens > 0
        return {name: self._of((names == name) & read) for name in sorted(set(names[read]))}

    def document_rows(self, documents: tuple[Sequence[str], Sequence[str]]) -> list[str]:
        """One line of JSON for each document that was read; `documents`: names, and the domain of each.

        `bytes` are those of the tokens that were scored: a count, or absent where they are not known to the byte.
        """
        rows = []
        for index in np.flatnonzero(self.tokens).tolist():
            row = {"document": documents[0][index], "domain": documents[1][index], "nats": float(self.nats[index])}
            row["tokens"] = int(self.tokens[index])
            if self.bytes is not None and self.exact_bytes:
                row["bytes"] = int(self.bytes[index])
            rows.append(json.dumps(row))
        return rows

    def _of(self, chosen: NDArray[np.bool_]) -> Sums:
        return Sums(self.nats[chosen], self.tokens[chosen], None if self.bytes is None else self.bytes[chosen])


def bin_of(tokens_before: NDArray[np.int64], border: int = 1) -> NDArray[np.int64]:
    """[...] >= 0 -> [...]: 0 for none, b for 2^(b-1) to 2^b - 1. The bin that `border` lies in is cut there."""
    found = np.frexp(tokens_before.astype(np.float64))[1].astype(np.int64)
    return found + (tokens_before >= border) if border & (border - 1) else found


def bin_names(most: int, border: int = 1) -> list[str]:
    """Of `bin_of` 0 to `most` tokens before a target; filled with zeros, so that names sort as numbers do."""
    width = len(str(most))
    begins = sorted({0, *(1 << b for b in range(most.bit_length())), border if border <= most else 0})
    edges = zip(begins, [*(begin - 1 for begin in begins[1:]), most], strict=True)
    return [f"{low:0{width}}" if low == high else f"{low:0{width}}-{high:0{width}}" for low, high in edges]


def tokens_before(document: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """document [B, S + 1], of every token of a window -> for its S targets: tokens before it, and its own document's.

    Both [B, S].
    """
    place = np.broadcast_to(np.arange(document.shape[1]), document.shape)
    begins = np.ones(document.shape, bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    begin = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return place[:, 1:], (place - begin)[:, 1:]
