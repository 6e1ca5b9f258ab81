"""The contract of an attention plugin: what it is built from, and what a forward pass tells it.

B sequences, S new positions, P those that a cache holds, L = P + S, H query heads, G key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from moelab.nn.kv_cache import Appending
from moelab.nn.rope import Rope

MadeT = TypeVar("MadeT")
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # as `nn.full_attention.fastest`
# Of a layer's block of queries: layer_id, sequences, their rows among the S, and the weights [b, heads, rows, keys].
Look = Callable[[int, slice, slice, Tensor], None]


@dataclass(frozen=True)
class AttentionContext:
    """What an attention may depend on when it is built."""

    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_id: int
    num_hidden_layers: int
    max_position_embeddings: int


class AttentionKernel(Protocol):
    """Computes one layer's heads, owns no parameters and keeps nothing between calls.

    query [B, H, S, d], key and value [B, G, S, d], all without positions: it rotates them itself (`inputs.rotation`,
    `nn.rope.rotate`), and appends the key as it wants to read it again, with the value, to `inputs.cache`. A query
    sees the keys of its own document up to itself, and what it computes doesn't change when more tokens follow.

    - `cache_mode`: what the keys in a cache are; a cache of one mode is refused by attention of another.
    - `reach`: positions up to which it is right whatever the model was trained on; None: as far as RoPE reaches.
    - `serves_sinks` (optional, looked up by name): True where its softmax takes `inputs.sinks` in (`nn.sinks`); a model
      that has sinks is refused with others.
    """

    @property
    def cache_mode(self) -> str: ...

    @property
    def reach(self) -> float | None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor: ...


@runtime_checkable
class TurnedKernel(AttentionKernel, Protocol):
    """A kernel that turns whole heads by their own positions and leaves the rest to `on_turned`.

    So attention that turns a part of each head, or keeps something else in a cache, can call that alone.
    """

    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """query [B, H, S, d], key [B, G, L, d], value [B, G, L, v] -> [B, H, S, v]; turned, those of the cache too."""


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares in one forward pass."""

    rope: Rope
    positions: Tensor  # [B, S] int64 of the new tokens; where `documents` are, from 0 in each of them
    dtype: torch.dtype  # of the tables
    past: int = 0  # P
    padding: Tensor | None = None  # [B, L] bool, False for padding; None: there is none
    documents: Tensor | None = None  # [B, L] int64: attention stays among equal neighbours; None: one a sequence
    given_mask: Tensor | None = None  # [B, 1, S, L], True or 0 where a query may look: a caller's own, in place of both
    cache: Appending | None = None
    attend: Attend | None = None  # computes in place of `full_attention.fastest`: for a look at all weights
    look: Look | None = None  # shown the weights block by block, by an attention that has them; others don't call it
    sinks: Tensor | None = None  # [H], the layer's: a logit more in each head's softmax, without a value (`nn.sinks`)
    shared: dict[Hashable, Any] = field(default_factory=dict)  # what `once` made

    def once(self, key: Hashable, make: Callable[[], MadeT]) -> MadeT:
        """What `make` gives, made by the first layer that asks in this pass."""
        if key not in self.shared:
            self.shared[key] = make()
        made: MadeT = self.shared[key]
        return made

    @property
    def length(self) -> int:
        """L."""
        return self.past + self.positions.shape[1]

    def rotation(self, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin [B or 1, 1, S, d] of positions [B or 1, S]; None: the tokens' own, made once."""
        if positions is None:
            return self.once("rotation", lambda: self.rotation(self.positions))
        return self.rope.tables(positions, self.dtype, self.length)

    def look_of(self, layer_id: int) -> Callable[[slice, slice, Tensor], None] | None:
        """`look` as `blocked_attention` calls it."""
        return None if self.look is None else partial(self.look, layer_id)

    @property
    def mask(self) -> Tensor | None:
        """Which keys each query may see, [B or 1, 1, S, L]; None where plain causal attention does.

        Holds S x L numbers: for short sequences, and for a few new tokens after many.
        """
        if self.given_mask is not None:
            return self.given_mask
        return self.once("mask", self._mask)

    def _mask(self) -> Tensor | None:
        mask = attention_mask(self.padding, self.positions.shape[1], self.past, self.positions.device)
        if self.documents is None or not self.several_documents:
            return mask
        if mask is None:
            seq = self.positions.shape[1]
            mask = torch.ones(seq, seq, dtype=torch.bool, device=self.positions.device).tril()[None, None]
        same = self.documents[:, self.past :, None] == self.documents[:, None, :]
        return mask & same[:, None]

    @property
    def several_documents(self) -> bool:
        """Whether documents meet in a sequence, as far as is known at no cost: True where an accelerator would wait."""
        return self.once("several documents", self._several)

    def _several(self) -> bool:
        documents = self.documents
        if documents is None:
            return False
        return documents.device.type != "cpu" or bool((documents != documents[:, :1]).any())

    @property
    def segments(self) -> Tensor | None:
        """[B, L] int64: a query sees keys of its own number alone, padding only padding; None: all of one kind."""
        if self.padding is None:
            return self.documents
        real = self.padding.long() - 1  # 0, and -1 for padding
        return real if self.documents is None else torch.where(self.padding, self.documents, real)

    @property
    def key_positions(self) -> Tensor:
        """[B or 1, L] int64, of all positions: from 0 in each document, and at the first token that is no padding."""
        return self.once("key positions", self._key_positions)

    def _key_positions(self) -> Tensor:
        index = torch.arange(self.length, device=self.positions.device)
        if self.documents is not None:
            segments = self.segments
            assert segments is not None
            return index - run_starts(segments)
        if self.padding is not None:
            return (index - self.padding.int().argmax(1, keepdim=True)).clamp(min=0)
        return index[None]


def run_starts(numbers: Tensor) -> Tensor:
    """numbers [B, L] -> where the run of equal neighbours that each stands in begins, [B, L] int64."""
    index = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.where(begins, index, 0).cummax(1).values


def attention_mask(padding: Tensor | None, seq: int, past: int, device: torch.device) -> Tensor | None:
    """Which keys each query may see: [B or 1, 1, S, L] bool, or None where plain causal attention does.

    padding [B, L] bool, False for padding. A padding query sees itself: a row without any key is NaN.
    """
    if padding is not None and padding.shape[1] != past + seq:
        raise ValueError(f"attention_mask covers {padding.shape[1]} positions, but {past} are cached and {seq} are new")
    if padding is None and past == 0:
        return None
    rows = torch.arange(past, past + seq, device=device)[:, None]
    columns = torch.arange(past + seq, device=device)[None, :]
    mask = (columns <= rows)[None, None]
    if padding is not None:
        mask = (mask & padding[:, None, None, :]) | (columns == rows)[None, None]
    return mask
