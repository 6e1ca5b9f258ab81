"""Keys and values of the positions already seen, one pair a layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moelab.errors import ConfigError


class Appending(Protocol):
    """What attention asks of a cache; `KVCache` is one."""

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """Append-only. `length` is the number of positions stored, padding included."""

    def __init__(self, num_hidden_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_hidden_layers
        self._values: list[Tensor | None] = [None] * num_hidden_layers
        self.mask: Tensor | None = None  # [B, length] bool, False for padding
        self.documents: Tensor | None = None  # [B, length] int64
        self.mode: str | None = None  # what the keys are, by the attention that filled it

    @property
    def length(self) -> int:
        first = self._keys[0]
        return 0 if first is None else first.shape[2]

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value [B, H_kv, S, head_dim] -> all of them so far, [B, H_kv, length, head_dim]."""
        old_key, old_value = self._keys[layer_id], self._values[layer_id]
        if old_key is not None and old_value is not None:
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self._keys[layer_id], self._values[layer_id] = key, value
        return key, value

    def held(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that was appended to, [B, H_kv, length, head_dim]."""
        key, value = self._keys[layer_id], self._values[layer_id]
        assert key is not None
        assert value is not None
        return key, value

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
