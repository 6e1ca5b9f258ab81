"""A cap on the assignments that are computed at once: a load spike takes longer, not more memory.

T tokens, N assignments, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moelab.moe.contracts import ExpertBackend, ExpertProblem
from moelab.moe.experts import ExpertBank
from moelab.moe.routing import Routing


class InChunks:
    """A backend that computes at most `limit` assignments at a time."""

    def __init__(self, inner: ExpertBackend, limit: int) -> None:
        self.name, self.inner, self.limit = inner.name, inner, limit

    def supports(self, problem: ExpertProblem) -> str | None:
        """Whether the inner one serves the largest chunk."""
        return self.inner.supports(replace(problem, num_assignments=min(self.limit, problem.num_assignments)))

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]."""
        return compute_in_chunks(self.inner, x, routing, bank, self.limit)


def compute_in_chunks(backend: ExpertBackend, x: Tensor, routing: Routing, bank: ExpertBank, limit: int) -> Tensor:
    """`backend(x, routing, bank)`, at most `limit` assignments at a time; x [T, D] -> [T, D].

    Chunks are runs of tokens, so no sum is split. Each is computed again in the backward pass and keeps
    nothing but its part of x and of the routing. A token with more than `limit` experts is a chunk of its own.
    """
    if routing.expert.numel() <= limit:
        return backend(x, routing, bank)
    pieces = [
        checkpoint(backend, x[tokens], part, bank, use_reentrant=False, preserve_rng_state=False)
        for tokens, part in _chunks(routing, limit)
    ]
    return torch.cat(pieces)


def _chunks(routing: Routing, limit: int) -> Iterator[tuple[slice, Routing]]:
    """Runs of tokens with their assignments."""
    if routing.top_k is not None:
        size = max(1, limit // routing.top_k)
        for start in range(0, routing.num_tokens, size):
            tokens = slice(start, min(start + size, routing.num_tokens))
            rows = slice(tokens.start * routing.top_k, tokens.stop * routing.top_k)
            yield tokens, _part(routing, tokens, rows)
        return
    per_token = torch.bincount(routing.token, minlength=routing.num_tokens).tolist()
    start = held = 0
    for token, count in enumerate([*per_token, limit + 1]):
        if held + count > limit and token > start:
            tokens = slice(start, token)
            inside = (routing.token >= start) & (routing.token < token)
            yield tokens, _part(routing, tokens, inside.nonzero().squeeze(-1))
            start, held = token, 0
        held += count


def _part(routing: Routing, tokens: slice, rows: slice | Tensor) -> Routing:
    """What a backend needs of a run of tokens; losses and observers look at the whole routing."""
    return replace(
        routing,
        token=routing.token[rows] - tokens.start,
        expert=routing.expert[rows],
        weight=routing.weight[rows],
        num_tokens=tokens.stop - tokens.start,
        scores=None, logits=None, token_mask=None, dropped=None, served=None, choices=None, bypass=None,
        statistics=None, extras={},
    )  # fmt: skip
