"""Activation checkpointing: a layer keeps its input only, and is computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moelab.moe.routing import LayerRecord, TokenInfo

LayerForward = Callable[..., tuple[Tensor, LayerRecord | None]]


def apply_activation_checkpointing(model: nn.Module, every: int = 1) -> None:
    """Checkpoint each `every`-th layer of `model.layers` whenever gradients are recorded. Names stay as they are.

    The records are those of the forward pass: what the second computation returns is thrown away, so nothing
    is counted twice. Noise from `TokenInfo.generator` is drawn as it was the first time.
    """
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        if index % every == 0:
            layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: LayerForward, x: Tensor, inputs: Any, info: TokenInfo) -> tuple[Tensor, LayerRecord | None]:
    if not torch.is_grad_enabled():
        return forward(x, inputs, info)
    drawn: list[Tensor] = []  # the generator's state when the layer was first computed

    def compute(x: Tensor) -> tuple[Tensor, LayerRecord | None]:
        noise = info.generator
        if noise is None:
            return forward(x, inputs, info)
        if not drawn:
            drawn.append(noise.get_state())
            return forward(x, inputs, info)
        later = noise.get_state()
        noise.set_state(drawn[0])
        try:
            return forward(x, inputs, info)
        finally:
            noise.set_state(later)

    result: tuple[Tensor, LayerRecord | None] = checkpoint(compute, x, use_reentrant=False)
    return result
