"""Experts by token id, from a fixed table: nothing to learn, nothing to balance."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moelab import Component, ConfigError, MoEContext, Router, Routing, TokenInfo, component, hookimpl, user_path
from moelab.safe_files import Reading, map_array, read_json
from moelab.seeds import derive_seed


@dataclass
class HashOptions:
    seed: int = 0  # of the table; each layer has its own
    frequencies: str | None = None  # a .npy or .json with the count of each token id: experts get equal mass, not ids


class Hash(nn.Module):
    """Experts by the token's id.

    Formula: S_t = table[id_t], w = 1 / K. The table deals ids to experts evenly at random, or, with `frequencies`,
    the most frequent id first to the expert with the least mass so far; further choices are distinct.
    Source: hash layers (2106.04426) 3 (section not opened), random balanced and frequency-balanced hashing.
    Use: a baseline that learned routers must beat; the first layers of deep models.
    Cost: a table of V x K int64; the loads are those of the text. Gives no scores, so most losses refuse it.
    """

    learns = False
    expert_rows = "its table deals token ids to all experts at once; start a new run with another table"
    table: Tensor

    def __init__(self, options: HashOptions, context: MoEContext) -> None:
        super().__init__()
        self.num_experts, self.top_k = context.num_experts, context.num_experts_per_tok
        table = hash_table(options, context)
        self.register_buffer("table", torch.from_numpy(table).to(torch.get_default_device()))

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token; x itself is not looked at."""
        expert = self.table[info.token_id]
        weight = torch.full(expert.shape, 1 / self.top_k, dtype=torch.float32, device=x.device)
        return Routing.from_topk(expert, weight, self.num_experts, token_mask=info.mask)

    def qwen2_moe_fields(self) -> str:
        return "its table has no place there"


def hash_table(options: HashOptions, context: MoEContext) -> np.ndarray:
    """[V, K] int64, the experts of each token id; distinct within a row."""
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
    return table


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


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("hash", HashOptions, Hash)]
