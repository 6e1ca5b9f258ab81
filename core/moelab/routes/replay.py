"""Replay: tokens go where a trace says, whatever the routers would say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moelab.data.batches import Batch
from moelab.errors import ConfigError, DataError
from moelab.moe.block import MoEBlock
from moelab.moe.routing import Routing, TokenInfo
from moelab.nn.transformer import Transformer
from moelab.routes.trace import Trace


@dataclass(frozen=True)
class Replay:
    """The routing override for windows `first` .. `first + count` - 1 of a trace.

    Experts and weights are the recorded ones, as float32. What the router adds without an expert (`Routing.bypass`)
    is no part of a trace and stays its own, so a swap between two models with MoE++ routers swaps the experts alone.
    The order of a token's experts is the recorded one: with equal weights, batches and kernels the bits are equal.
    """

    trace: Trace
    first: int
    count: int

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        layer = self.trace.layer(layer_id)
        assert layer is not None, f"layer {layer_id} is not in the trace: check_replayable was not asked"
        length = self.trace.token_id.shape[1]
        tokens = self.count * length
        if routing.num_tokens != tokens:
            raise ConfigError(f"replay: {routing.num_tokens} tokens, where the trace has {tokens} for these windows")
        starts = layer.starts[self.first * length : self.first * length + tokens + 1]
        token = np.repeat(np.arange(tokens), np.diff(starts))
        kept = slice(int(starts[0]), int(starts[-1]))
        return replace(
            routing,
            token=_brought(token, x.device),
            expert=_brought(layer.expert[kept].astype(np.int64), x.device),
            weight=_brought(layer.weight[kept].copy(), x.device),
            top_k=layer.top_k, served=None, choices=None, dropped=None,
        )  # fmt: skip


def _brought(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it: from pageable memory a copy would."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def check_replayable(trace: Trace, model: Transformer, name: str) -> None:
    """Raise DataError where the model can't be sent along these routes, saying what differs."""
    if trace.facts["vocab_size"] != model.config.vocab_size:
        raise DataError(
            f"{name}: was recorded from a model of {trace.facts['vocab_size']} tokens, and this one has "
            f"{model.config.vocab_size}; replay it in a model with the same tokenizer"
        )
    there = {layer.layer_id: layer.num_experts for layer in trace.layers}
    here = {b.layer_id: b.layout.num_experts for b in model.modules() if isinstance(b, MoEBlock)}
    if there != here:
        raise DataError(
            f"{name}: has routes for MoE layers {_layers(there)}, and the model has {_layers(here)}; replay it in a "
            "model of the same layout"
        )
    length, most = trace.token_id.shape[1], model.config.max_position_embeddings
    if length > most:
        raise DataError(f"{name}: has windows of {length} tokens, and the model reads at most {most}")


def trace_batches(trace: Trace, batch_size: int | None = None) -> Iterator[tuple[int, Batch]]:
    """(first window, batch) of a trace's own text; None: in batches as it was recorded."""
    size = batch_size or trace.batch_size
    domain = trace.domain_of_documents()
    for first in range(0, trace.windows, size):
        part = {
            name: torch.from_numpy(getattr(trace, name)[first : first + size].astype(np.int64))
            for name in ("token_id", "target_id", "document_id", "target_document_id")
        }
        yield first, Batch(
            input_ids=part["token_id"], targets=part["target_id"], document_id=part["document_id"],
            domain_id=torch.from_numpy(domain[part["document_id"].numpy()]),
            target_document_id=part["target_document_id"],
        )  # fmt: skip


def _layers(found: dict[int, int]) -> str:
    """{layer: E} -> "0-2 (8 experts), 3 (16 experts)"."""
    runs: list[list[int]] = []  # [first, last, E]
    for layer, experts in sorted(found.items()):
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == experts:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, experts])
    return ", ".join(f"{a}{f'-{b}' if b > a else ''} ({experts} experts)" for a, b, experts in runs) or "none"
