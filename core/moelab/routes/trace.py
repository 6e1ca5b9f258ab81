"""A trace: which experts each token of a text went to, with which weights, in every MoE layer.

W windows of S tokens, T = W * S tokens, N assignments of a layer. On disk (docs/traces.md) it is a folder of two files:
trace.json, the head, and routes.safetensors, the arrays, each with its xxh3-128 in the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# [W, S] each: what the model read, what it had to predict, and where they stand
TOKEN_ARRAYS = ("token_id", "target_id", "position", "document_id", "target_document_id")
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LayerTrace:
    """The assignments of one MoE layer in token order, those of a token in the router's order."""

    layer_id: int
    num_experts: int
    router: str  # the class that decided
    top_k: int | None  # every token has so many; None: `per_token` says how many each has
    expert: np.ndarray  # [N], the smallest unsigned integer that holds num_experts - 1
    weight: np.ndarray  # [N] float32, as the experts' outputs were multiplied
    per_token: np.ndarray | None = None  # [T] unsigned
    dropped: int = 0  # assignments wanted and not served, over capacity for instance
    other_choices: int = 0  # null, zero, copy and constant experts that the router also offers; not recorded

    def counts(self) -> np.ndarray:
        """[T] int64: how many experts each token has."""
        if self.per_token is not None:
            return self.per_token.astype(np.int64)
        assert self.top_k is not None
        return np.full(len(self.expert) // self.top_k, self.top_k, np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """[T + 1] int64: the assignments of token t are those from starts[t] to starts[t + 1] - 1."""
        return np.concatenate([[0], np.cumsum(self.counts())])

    def pairs(self) -> Pairs:
        """(token [N] int64, expert [N] int64, weight [N] float32)."""
        counts = self.counts()
        return np.repeat(np.arange(len(counts)), counts), self.expert.astype(np.int64), self.weight

    def loads(self) -> np.ndarray:
        """[E] int64: assignments of each expert."""
        return np.bincount(self.expert, minlength=self.num_experts)

    def heaviest(self) -> tuple[np.ndarray, np.ndarray]:
        """(expert [T] int64, weight [T]) of each token's largest weight, the first of equals; -1 and 0 with none."""
        counts = self.counts()
        expert, weight = np.full(len(counts), -1, np.int64), np.zeros(len(counts), np.float32)
        token, chosen, weights = self.pairs()
        order = np.lexsort((np.arange(len(token)), -weights, token))
        first = order[np.searchsorted(token, np.flatnonzero(counts))]
        expert[counts > 0], weight[counts > 0] = chosen[first], weights[first]
        return expert, weight


@dataclass(frozen=True)
class Trace:
    """Routes with the text that they belong to, so that they can be replayed without corpus or tokenizer."""

    token_id: np.ndarray  # [W, S] unsigned, as all that follow
    target_id: np.ndarray  # the next token
    position: np.ndarray  # within the window
    document_id: np.ndarray  # of the token, into `documents`
    target_document_id: np.ndarray
    documents: list[tuple[str, str]]  # (name, domain)
    layers: list[LayerTrace]  # from the lowest up
    facts: dict[str, Any]  # what it was recorded from: model, tokenizer, data, precision; see docs/traces.md

    @property
    def windows(self) -> int:
        return len(self.token_id)

    @property
    def tokens(self) -> int:
        return int(self.token_id.size)

    @property
    def batch_size(self) -> int:
        """Windows that were routed together: with another number a matmul may round otherwise."""
        return int(self.facts["batch_size"])

    @property
    def domains(self) -> list[str]:
        return sorted({domain for _, domain in self.documents})

    def domain_of_documents(self) -> np.ndarray:
        """[n] int64, into `domains`."""
        places = {domain: place for place, domain in enumerate(self.domains)}
        return np.array([places[domain] for _, domain in self.documents], np.int64)

    def layer(self, layer_id: int) -> LayerTrace | None:
        return next((layer for layer in self.layers if layer.layer_id == layer_id), None)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) of all that routes.safetensors holds."""
        for name in TOKEN_ARRAYS:
            yield name, getattr(self, name)
        for layer in self.layers:
            yield f"layer_{layer.layer_id:02d}.expert", layer.expert
            yield f"layer_{layer.layer_id:02d}.weight", layer.weight
            if layer.per_token is not None:
                yield f"layer_{layer.layer_id:02d}.per_token", layer.per_token


def smallest(values: np.ndarray, largest: int | None = None) -> np.ndarray:
    """`values` as the smallest unsigned integer type that holds `largest`, or all of them."""
    top = int(values.max(initial=0)) if largest is None else largest
    return np.ascontiguousarray(values.astype(np.min_scalar_type(max(top, 0))))
