"""Keys and values of the positions already seen, one pair a layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Appending(Protocol):
    """What attention asks of a cache; `KVCache` is one."""

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """Append-only. `length` is the number of positions stored, padding included."""

    def __init__(self, num_hidden_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_hidden_layers
        self._values: list[Tensor | None] = [None] * num_hidden_layers
        self.mask: Tensor | None = None  # [B, length] bool, False for padding

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

    def extend_mask(self, mask: Tensor) -> Tensor:
        """mask [B, S] of the new positions -> [B, length + S] of all."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        return self.mask
