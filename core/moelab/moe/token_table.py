"""Experts by token id, from a fixed table: dealt evenly at random, or so that each has the same mass of text.

V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.contracts import MoEContext
from moelab.paths import user_path
from moelab.safe_files import Reading, map_array, read_json
from moelab.seeds import derive_seed


@dataclass
class TokenTable:
    """How ids are dealt to experts. Hash layers (2106.04426) 3 (section not opened): random and frequency-balanced."""

    seed: int = 0  # of the table; each layer has its own
    frequencies: str | None = None  # a .npy or .json with the count of each token id: experts get equal mass, not ids


def token_table(options: TokenTable, context: MoEContext) -> Tensor:
    """[V, K] int64, the experts of each token id; distinct within a row.

    Ids go to experts evenly at random, or, with `frequencies`, the most frequent first to the expert with the least
    mass so far; further choices are random. Raises ConfigError for a file that holds no V counts.
    """
    random = np.random.default_rng(derive_seed(options.seed, "hash", context.layer_id))
    vocabulary, experts = context.vocab_size, context.num_experts
    if options.frequencies is None:
        first = random.permutation(vocabulary) % experts
    else:
        first = _equal_mass(_read_counts(user_path(options.frequencies, "frequencies"), vocabulary), experts)
    table = np.empty((vocabulary, context.num_experts_per_tok), dtype=np.int64)
    table[:, 0] = first
    if context.num_experts_per_tok > 1:
        for rows in np.array_split(np.arange(vocabulary), max(1, vocabulary // 4096)):
            others = random.random((len(rows), experts - 1)).argsort(axis=1)[:, : context.num_experts_per_tok - 1]
            table[rows, 1:] = (first[rows, None] + 1 + others) % experts
    return torch.from_numpy(table).to(torch.get_default_device())


def _equal_mass(counts: np.ndarray, experts: int) -> np.ndarray:
    """Greedy: the heaviest id to the lightest expert."""
    heap = [(0.0, expert) for expert in range(experts)]
    first = np.empty(len(counts), dtype=np.int64)
    for token in np.argsort(-counts, kind="stable").tolist():
        mass, expert = heap[0]
        first[token] = expert
        heapq.heapreplace(heap, (mass + float(counts[token]), expert))
    return first


def _read_counts(path: Path, vocabulary: int) -> np.ndarray:
    reading = Reading(ConfigError, "`frequencies` names a .npy or .json list of counts")
    try:
        counts = map_array(path, reading) if path.suffix == ".npy" else np.array(read_json(path, reading))
        counts = counts.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        reading.refuse(path, f"is no list of numbers ({error})", error)
    if counts.shape != (vocabulary,) or not np.isfinite(counts).all() or (counts < 0).any():
        raise ConfigError(f"frequencies: {path} must hold {vocabulary} counts, one a token id; it has {counts.shape}")
    return counts
