"""Keys and values of the positions already seen, one pair a layer.

B sequences, G key heads, L positions stored, d head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moelab.errors import ConfigError

LEAST_ROOM = 64  # positions that a layer's memory is made for at first; it doubles when it is full


class Appending(Protocol):
    """What attention asks of a cache; `KVCache` is one."""

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """Append-only. `length` is the number of positions stored, padding included.

    Memory is made ahead, for `room` positions where they are known, and doubled when it is full: a token costs its own
    key and value, not a copy of all before it.
    """

    def __init__(self, num_hidden_layers: int, room: int = LEAST_ROOM) -> None:
        self._keys: list[Tensor | None] = [None] * num_hidden_layers  # [B, G, room, d]
        self._values: list[Tensor | None] = [None] * num_hidden_layers
        self._lengths = [0] * num_hidden_layers
        self._room = max(room, 1)
        self.mask: Tensor | None = None  # [B, length] bool, False for padding
        self.documents: Tensor | None = None  # [B, length] int64
        self.mode: str | None = None  # what the keys are, by the attention that filled it

    @property
    def length(self) -> int:
        return self._lengths[0]

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, G, S, d] -> all of them so far, [B, G, length, d], which the cache goes on writing behind."""
        begin = self._lengths[layer_id]
        end = begin + key.shape[2]
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            return self._append_apart(layer_id, key, value)  # what a backward pass will read isn't written over
        for held, new in ((self._keys, key), (self._values, value)):
            memory = self._with_room(held[layer_id], new, begin, end)
            memory[:, :, begin:end] = new
            held[layer_id] = memory
        self._lengths[layer_id] = end
        return self.held(layer_id)

    def held(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that was appended to, [B, G, length, d]."""
        key, value, length = self._keys[layer_id], self._values[layer_id], self._lengths[layer_id]
        assert key is not None
        assert value is not None
        return key[:, :, :length], value[:, :, :length]

    def taken(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """`held`, which the cache forgets: for who goes on with a memory of its own."""
        found = self.held(layer_id)
        self._keys[layer_id] = self._values[layer_id] = None
        return found

    def take_rows(self, rows: Tensor) -> None:
        """Go on with these sequences, `rows` [B'] int64, in this order: some left out, or several times."""
        for held in (self._keys, self._values):
            held[:] = [None if memory is None else memory.index_select(0, rows) for memory in held]
        self.mask = None if self.mask is None else self.mask.index_select(0, rows)
        self.documents = None if self.documents is None else self.documents.index_select(0, rows)

    def take_mode(self, mode: str) -> None:
        """Raise ConfigError where other attention, or another rotary embedding, has filled it."""
        if self.mode is not None and self.mode != mode:
            raise ConfigError(
                f"cache: holds {self.mode}, and this model's attention reads {mode}; begin with a new KVCache"
            )
        self.mode = mode

    def extend_documents(self, documents: Tensor) -> Tensor:
        """documents [B, S] of the new positions -> [B, length + S] of all."""
        self.documents = documents if self.documents is None else torch.cat([self.documents, documents], dim=1)
        return self.documents

    def extend_mask(self, mask: Tensor) -> Tensor:
        """mask [B, S] of the new positions -> [B, length + S] of all."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        return self.mask

    def _with_room(self, memory: Tensor | None, new: Tensor, begin: int, end: int) -> Tensor:
        """Memory that holds the first `begin` positions and has room for `end` of them."""
        if memory is not None and memory.shape[2] >= end:
            return memory
        room = max(self._room, end) if memory is None else max(2 * memory.shape[2], end)
        larger = new.new_zeros(*new.shape[:2], room, new.shape[3])
        if memory is not None:
            larger[:, :, :begin] = memory[:, :, :begin]
        return larger

    def _append_apart(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._lengths[layer_id]:
            old_key, old_value = self.held(layer_id)
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self._keys[layer_id], self._values[layer_id], self._lengths[layer_id] = key, value, key.shape[2]
        return key, value
