"""Steps that many balance losses share: masked means, normalised scores, loads. Everything in float32 or wider.

T tokens, E' choices, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.contracts import BalanceContext
from moelab.moe.routing import LayerRecord


def scores_of(record: LayerRecord) -> Tensor:
    """[T, E'] scores of a record, or ConfigError naming the layer."""
    if record.routing.scores is None:
        raise ConfigError(f"layer {record.layer_id}: this loss needs scores, and the layer's router gives none")
    return record.routing.scores


def logits_of(record: LayerRecord) -> Tensor:
    """[T, E'] logits of a record, or ConfigError naming the layer."""
    if record.routing.logits is None:
        raise ConfigError(f"layer {record.layer_id}: this loss needs logits, and the layer's router gives none")
    return record.routing.logits


def extra_of(record: LayerRecord, key: str, router: str) -> Tensor:
    """`routing.extras[key]`, or ConfigError naming the layer and the router that would give it."""
    found = record.routing.extras.get(key)
    if found is None:
        raise ConfigError(f"layer {record.layer_id}: this loss needs '{key}', which only the router {router} gives")
    return found


def probabilities(scores: Tensor) -> Tensor:
    """Non-negative scores [T, E'] -> divided by their sum over E'; sigmoids become shares, a softmax stays itself."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [T, ...] over tokens that are not padding -> [...]; 0 where all are."""
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    keep = mask.view(-1, *[1] * (values.ndim - 1))
    return torch.where(keep, values, torch.zeros_like(values)).sum(0) / mask.sum().clamp_min(1)


def shares(counts: Tensor) -> Tensor:
    """Counts [..., E'] -> float shares that sum to one over E'; all zeros stay zeros."""
    counts = counts.to(torch.float64 if counts.dtype == torch.float64 else torch.float32)
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def batch_counts(record: LayerRecord, context: BalanceContext) -> Tensor:
    """[E'] int64 on the record's device: what balance losses count of its layer, over the whole batch if known."""
    if context.batch_counts is None:
        return record.balance_counts
    return context.batch_counts[record.layer_id].to(record.counts.device)


def batch_choices(record: LayerRecord, context: BalanceContext) -> Tensor:
    """[E'] int64 on the record's device: what was asked for in its layer, over the whole batch if it is known."""
    known = context.batch_counts if context.batch_choices is None else context.batch_choices
    return record.wanted if known is None else known[record.layer_id].to(record.counts.device)


def device_tokens(record: LayerRecord, num_devices: int) -> Tensor:
    """[T, D] bool: whether a token was sent to a device, D groups of consecutive experts; False for padding."""
    return record.routing.choice_map()[:, : record.routing.num_experts].unflatten(1, (num_devices, -1)).any(-1)


def layer_mean(records: Sequence[LayerRecord], term: Callable[[LayerRecord], Tensor]) -> Tensor:
    """The mean of `term` over layers, so that a coefficient means the same at any depth."""
    return torch.stack([term(record) for record in records]).mean()


def squared_variation(values: Tensor) -> Tensor:
    """CV^2 = variance / mean^2 over the last axis, with the population variance; 0 for all zeros."""
    mean = values.mean(-1)
    return values.var(-1, correction=0) / mean.square().clamp_min(torch.finfo(values.dtype).tiny)


def sum_by_sequence(values: Tensor, record: LayerRecord) -> Tensor:
    """values [T, ...], padding already zero -> sums over each sequence, [B, ...]."""
    if record.info is None:
        raise ConfigError(f"layer {record.layer_id}: a loss by sequence needs the record's `info`")
    batch, length = record.info.sequence_shape()
    return values.reshape(batch, length, *values.shape[1:]).sum(1)
