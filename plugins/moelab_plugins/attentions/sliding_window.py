"""A window of the last positions, in all layers or some."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import MISSING
from torch import Tensor

from moelab import Component, ConfigError, component, hookimpl
from moelab.moe.per_layer import match_layers
from moelab.nn.attention_inputs import AttentionContext, AttentionInputs, AttentionKernel
from moelab.nn.blocked_attention import View
from moelab.nn.full_attention import ROTATED, FullAttention, turned
from moelab.nn.masked_attention import masked_attention


@dataclass
class SlidingWindowOptions:
    window: int = MISSING  # positions that a query sees, its own included
    layers: str | None = None  # which layers have it, a pattern like "0-3,7"; the others see all. null: every layer

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")


class SlidingWindow:
    """The last `window` positions of the same document, the query's own included.

    Formula: softmax(q_i k_j / sqrt(d)) over i - window < j <= i, q and k turned by their positions.
    Source: Longformer (2004.05150) 3.1; Mistral (2310.06825) 2, whose text has one position more; transformers 5.23,
    masking_utils.py: sliding_window_overlay, and configuration_qwen2.py for which layers of Qwen2 have it.
    Use: Qwen2 and Mistral checkpoints that say so; long texts at a cost that grows with their length.
    Cost: S * window scores a head. Keys outside the window stay in the cache.
    """

    cache_mode = ROTATED
    serves_sinks = True

    def __init__(self, window: int, layer_id: int, trained: int) -> None:
        """`trained`: the model's longest sequence; a window within it shows no distance that is new, in any text."""
        self.window = window
        self.reach = math.inf if window <= trained else None
        self.full = FullAttention(layer_id)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.on_turned(*turned(self.full.layer_id, query, key, value, inputs), inputs)

    def on_turned(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """As `TurnedKernel`."""
        if inputs.length <= self.window:  # it leaves nothing out
            return self.full.on_turned(query, key, value, inputs)
        if inputs.given_mask is not None or inputs.attend is not None:
            raise ConfigError("model.attention: sliding_window takes masks of padding alone, and shows no weights")
        view = inputs.once(("sliding_window", self.window), lambda: View.of(inputs, window=self.window))
        return masked_attention([query], key, value, view, inputs.look_of(self.full.layer_id), inputs.sinks)


def build(options: SlidingWindowOptions, context: AttentionContext) -> AttentionKernel:
    pattern = f"0-{context.num_hidden_layers - 1}" if options.layers is None else options.layers
    layers = match_layers(pattern, context.num_hidden_layers, "layers")
    return (
        SlidingWindow(options.window, context.layer_id, context.max_position_embeddings)
        if context.layer_id in layers
        else FullAttention(context.layer_id)
    )


build.__doc__ = SlidingWindow.__doc__


@hookimpl
def moelab_attentions() -> list[Component[AttentionContext, AttentionKernel]]:
    return [component("sliding_window", SlidingWindowOptions, build)]
