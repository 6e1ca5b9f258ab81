"""How far two traces of the same text agree on who goes where, by layer and document.

T tokens, E experts, m documents. Of a token with experts A in one trace and B in the other, |A and B| assignments are
equal, of max(|A|, |B|).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab.errors import DataError
from moelab.routes.trace import LayerTrace, Trace


@dataclass(frozen=True)
class LayerAgreement:
    """Sums over the tokens of each document: all [m] float64."""

    layer_id: int
    equal: np.ndarray  # assignments that both traces have
    wanted: np.ndarray  # the most that could be equal
    same_top: np.ndarray  # tokens whose heaviest expert is the same
    tokens: np.ndarray
    loads: tuple[np.ndarray, np.ndarray]  # of the first trace and the second, [m, E] float64 assignments
    together: np.ndarray  # [E, E]: tokens with expert e in the first trace and f in the second

    @property
    def share(self) -> float:
        return float(self.equal.sum() / max(self.wanted.sum(), 1))

    def chance(self, documents: np.ndarray | None = None) -> float:
        """Share that would be equal did both choose as often as they do, independently of each other.

        `documents` [m] bool: as often as they do in these; None: in all.
        """
        those = np.ones(len(self.tokens), bool) if documents is None else documents
        first, second = (load[those].sum(0) for load in self.loads)
        return float(first @ second / max(self.tokens[those].sum(), 1) / max(self.wanted[those].sum(), 1))


def compare_routes(a: Trace, b: Trace, names: tuple[str, str]) -> list[LayerAgreement]:
    """By layer, from the lowest up. Raises DataError where the traces are not of the same text or layout."""
    _check(a, b, names)
    document = a.document_id.ravel().astype(np.int64)
    return [_compare(one, other, document, len(a.documents)) for one, other in zip(a.layers, b.layers, strict=True)]


def _compare(a: LayerTrace, b: LayerTrace, document: np.ndarray, documents: int) -> LayerAgreement:
    experts = a.num_experts
    keys = [np.unique(token * experts + expert) for token, expert, _ in (a.pairs(), b.pairs())]  # [N] each
    both = np.intersect1d(keys[0], keys[1], assume_unique=True) // experts
    counts = [np.bincount(key // experts, minlength=len(document)) for key in keys]
    loads = [_loads(key, document, documents, experts) for key in keys]
    most = np.maximum(*counts)
    top = [layer.heaviest()[0] for layer in (a, b)]
    wanted = np.bincount(document, most, documents)
    return LayerAgreement(
        a.layer_id,
        equal=np.bincount(document[both], minlength=documents).astype(np.float64),
        wanted=wanted,
        same_top=np.bincount(document, top[0] == top[1], documents),
        tokens=np.bincount(document, minlength=documents).astype(np.float64),
        loads=(loads[0], loads[1]),
        together=_together(keys[0], keys[1], experts),
    )


def _loads(key: np.ndarray, document: np.ndarray, documents: int, experts: int) -> np.ndarray:
    """key [N], token * E + expert -> [m, E] float64 assignments."""
    place = document[key // experts] * experts + key % experts
    return np.bincount(place, minlength=documents * experts).reshape(documents, experts).astype(np.float64)


def _together(a: np.ndarray, b: np.ndarray, experts: int) -> np.ndarray:
    """a, b [N] sorted keys token * E + expert -> [E, E] float64 tokens of each pair of experts."""
    maps = []
    for key in (a, b):
        token, expert = np.divmod(key, experts)
        maps.append((token, expert))
    starts = np.searchsorted(maps[1][0], maps[0][0], side="left")
    counts = np.searchsorted(maps[1][0], maps[0][0], side="right") - starts
    first = np.repeat(maps[0][1], counts)
    within = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    second = maps[1][1][np.repeat(starts, counts) + within]
    return np.bincount(first * experts + second, minlength=experts**2).reshape(experts, experts).astype(np.float64)


def _check(a: Trace, b: Trace, names: tuple[str, str]) -> None:
    where = f"{names[0]} and {names[1]}"
    if a.facts["tokenizer"] != b.facts["tokenizer"]:
        raise DataError(f"{where}: were recorded with different tokenizers; trace both runs with one")
    if a.token_id.shape != b.token_id.shape or not np.array_equal(a.token_id, b.token_id):
        raise DataError(
            f"{where}: are of different text ({a.windows} x {a.token_id.shape[1]} and {b.windows} x "
            f"{b.token_id.shape[1]} tokens); trace both with the same --data, --tokens and train.sequence_length"
        )
    shapes = [[(layer.layer_id, layer.num_experts) for layer in trace.layers] for trace in (a, b)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{where}: have other MoE layers or numbers of experts ({_told(shapes[0])} and {_told(shapes[1])}): there "
            "is no saying which expert is which"
        )


def _told(shape: list[tuple[int, int]]) -> str:
    experts = sorted({number for _, number in shape})
    return f"{len(shape)} layers of {', '.join(map(str, experts))} experts"
