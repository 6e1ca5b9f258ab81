"""An attention: the first tokens of a document and the last ones, none between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import Component, component, hookimpl
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs
from moelab.nn.full_attention import ROTATED, torch_attention, turned


@dataclass
class Options:
    first: int = 4  # tokens at the beginning that every query sees
    last: int = 64  # tokens that a query sees up to itself

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 1:
            raise ValueError(f"first must not be negative and last at least 1, not {self.first}, {self.last}")


class MyAttention:
    """Attention sinks and a window (StreamingLLM, 2309.17453). Its mask makes it one for short texts."""

    cache_mode = ROTATED  # what it leaves in a cache: keys turned by their own positions
    reach = None  # as far as the rotary embedding

    def __init__(self, options: Options, context: AttentionContext) -> None:
        self.options, self.layer_id = options, context.layer_id

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """query [B, H, S, d], key and value [B, G, S, d] -> [B, H, S, d]."""
        query, key, value = turned(self.layer_id, query, key, value, inputs)
        return torch_attention(
            query, key, value, inputs.once(("my_attention", self.options.last), lambda: self._mask(inputs))
        )

    def _mask(self, inputs: AttentionInputs) -> Tensor:
        """[B or 1, 1, S, L] bool: which keys each query sees, made once for all layers."""
        place = inputs.key_positions  # from 0 in each document
        queries, keys = place[:, None, inputs.past :, None], place[:, None, None, :]
        seen = (queries - keys < self.options.last) | (keys < self.options.first)
        index = torch.arange(inputs.length, device=place.device)
        causal = index <= index[inputs.past :, None]
        return seen & (causal if inputs.mask is None else inputs.mask)


@hookimpl
def moelab_attentions() -> list[Component]:
    return [component("my_attention", Options, MyAttention)]
