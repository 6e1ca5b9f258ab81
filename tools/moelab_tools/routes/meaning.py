"""What the experts of a trace have to do with its text: by token, by domain, and by domain once the token is known.

Each is a share of what there is to know, beside what chance gives (moe/specialisation.py). An expert that follows the
byte follows the domain too, since domains spell differently; only what is left given the token is the domain's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.data.token_classes import CLASSES
from moelab.moe.specialisation import Information, entropy, information_about, mutual_information
from moelab.routes.trace import LayerTrace, Trace

FAVOURITES = 6  # tokens named for each expert
LEAST_COUNT = 5  # occurrences of a token that is named


@dataclass(frozen=True)
class LayerMeaning:
    """One layer: its loads and tables, and the three informations."""

    layer_id: int
    loads: np.ndarray  # [E]
    by_domain: np.ndarray  # [E, domains] assignments
    by_class: np.ndarray  # [E, classes] assignments
    of_token: float  # I(expert; token) / H(expert)
    domain: Information | None  # None: there is one domain only
    domain_given_token: Information | None
    favourites: list[list[int]]  # [E] token ids, those that choose the expert most above its load

    def word(self, other: LayerMeaning | None = None) -> str:
        """Whether the colours mean anything beyond the byte, as far as domains can tell; `other`: an untrained layer.

        Random weights tell documents apart as well: what attention mixes in from the text before reaches any router.
        """
        if self.domain is None or self.domain_given_token is None:
            return "one domain: can't tell"
        if not self.domain_given_token.beyond_chance:
            return "domain, by its tokens alone" if self.domain.beyond_chance else "no more than chance"
        beside = None if other is None else other.domain_given_token
        if beside is not None and self.domain_given_token.share <= beside.share:
            return "beyond the token, but no more than the other"
        return "domain, beyond the token"


def meaning(
    trace: Trace, class_of_id: np.ndarray, *, permutations: int = 40, seen: Callable[[], None] = lambda: None
) -> list[LayerMeaning]:
    """Of every layer of a trace; class_of_id [V] into CLASSES."""
    token = trace.token_id.ravel().astype(np.int64)
    document = trace.document_id.ravel().astype(np.int64)
    found = []
    for layer in trace.layers:
        found.append(_layer(layer, trace, token, document, class_of_id, permutations))
        seen()
    return found


def _layer(
    layer: LayerTrace, trace: Trace, token: np.ndarray, document: np.ndarray, kinds: np.ndarray, permutations: int
) -> LayerMeaning:
    place, expert, _ = layer.pairs()
    tokens, documents = token[place], document[place]
    label_of_document = trace.domain_of_documents()
    labels = label_of_document[documents]

    def about(given: np.ndarray | None) -> Information | None:
        if len(trace.domains) < 2 or len(expert) == 0:
            return None
        return information_about(expert, labels, documents, label_of_document, token=given, permutations=permutations)

    spread = entropy(expert)
    return LayerMeaning(
        layer.layer_id,
        layer.loads(),
        _table(expert, labels, layer.num_experts, len(trace.domains)),
        _table(expert, kinds[tokens].astype(np.int64), layer.num_experts, len(CLASSES)),
        mutual_information(expert, tokens) / spread if spread > 0 else 0.0,
        about(None),
        about(tokens),
        _favourites(expert, tokens, layer.num_experts),
    )


def _table(expert: np.ndarray, label: np.ndarray, experts: int, labels: int) -> np.ndarray:
    return np.bincount(expert * labels + label, minlength=experts * labels).reshape(experts, labels)


def _favourites(expert: np.ndarray, token: np.ndarray, experts: int) -> list[list[int]]:
    """The tokens of which the largest part goes to each expert, of those that occur often enough to say so."""
    ids, place, counts = np.unique(token, return_inverse=True, return_counts=True)
    share = _table(expert, place.astype(np.int64), experts, len(ids)) / counts
    share[:, counts < LEAST_COUNT] = 0
    order = np.argsort(-share, axis=1, kind="stable")[:, :FAVOURITES]
    return [[int(ids[i]) for i in row if share[e, i] > 0] for e, row in enumerate(order)]


def to_json(found: LayerMeaning) -> dict[str, Any]:
    """For the page; numbers are rounded to what it shows."""

    def told(one: Information | None) -> dict[str, float] | None:
        if one is None:
            return None
        high = one.chance_high / one.entropy if one.entropy > 0 else 0.0
        return {"share": round(one.share, 5), "chance": round(one.chance_share, 5), "high": round(high, 5)}

    return {
        "layer": found.layer_id, "loads": found.loads.tolist(), "by_domain": found.by_domain.tolist(),
        "by_class": found.by_class.tolist(), "token": round(found.of_token, 5), "domain": told(found.domain),
        "domain_given_token": told(found.domain_given_token)
    }  # fmt: skip
