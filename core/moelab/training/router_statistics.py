"""What the routers did over the micro-batches of a step or an interval, summed on the device.

Adding never waits for the device; `reduce` moves one vector to the host. The formulas, with their
ranges and what is alarming, are in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.moe.routing import LayerRecord, Routing
from moelab.parallel.placement import contiguous, violation

SUMS = 4  # after the E counts: token entropy, top-k mass, tokens, dropped assignments


@dataclass
class _Layer:
    sums: Tensor  # [E + SUMS] float64: exact for counts up to 2**53
    num_experts: int
    has_distribution: bool  # the router offers scores or logits, so an entropy exists
    has_drops: bool  # the router reports dropped assignments, be it zero
    is_ragged: bool  # the number of experts differs from token to token, or some were asked for and not served


@dataclass(frozen=True)
class RouterReport:
    """Host numbers."""

    metrics: dict[str, float]  # by tag
    loads: dict[int, list[float]]  # layer -> each expert's share of the assignments, summing to 1


class RouterStatistics:
    """Sums over `add`ed records, padding excluded; `reduce` gives the metrics and starts over."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    @torch.no_grad()
    def add(self, records: Sequence[LayerRecord]) -> None:
        """Add one micro-batch: the records of all MoE layers."""
        for record in records:
            routing = record.routing
            probability = _distribution(routing)
            sums = torch.cat([record.counts.double(), _token_sums(routing, probability)])  # [E + SUMS]
            layer = self._layers.get(record.layer_id)
            if layer is None:
                self._layers[record.layer_id] = _Layer(
                    sums,
                    routing.num_experts,
                    has_distribution=probability is not None,
                    has_drops=routing.dropped is not None,
                    is_ragged=routing.top_k is None or routing.served is not None,
                )
            else:
                layer.sums = layer.sums + sums

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> RouterReport:
        """What was added, then empty.

        `all_reduce` sums one float64 vector over the ranks; None for a single process. A layer that saw no
        token has no metrics; one whose tokens reached no expert has `experts_per_token` 0 and no load.
        """
        layers = dict(sorted(self._layers.items()))
        self._layers = {}
        if not layers:
            return RouterReport({}, {})
        vector = torch.cat([layer.sums for layer in layers.values()])
        if all_reduce is not None:
            vector = all_reduce(vector)
        host = vector.tolist()
        metrics: dict[str, float] = {}
        loads: dict[int, list[float]] = {}
        per_layer: list[dict[str, float]] = []
        start = 0
        for layer_id, layer in layers.items():
            counts = host[start : start + layer.num_experts]
            sums = host[start + layer.num_experts : start + layer.num_experts + SUMS]
            start += layer.num_experts + SUMS
            if sums[2] == 0:
                continue
            if sum(counts) == 0:
                values = {"experts_per_token": 0.0} | ({"dropped_fraction": 1.0} if sums[3] else {})
            else:
                values = {**_load_metrics(counts), **_token_metrics(layer, sum(counts), sums)}
                loads[layer_id] = [count / sum(counts) for count in counts]
            per_layer.append(values)
            metrics.update({f"moe/layer_{layer_id:02d}/{key}": value for key, value in values.items()})
        metrics.update({f"moe/mean/{key}": value for key, value in _mean_over_layers(per_layer)})
        return RouterReport(metrics, loads)


def rank_metrics(loads: Mapping[int, Sequence[float]], ranks: int) -> dict[str, float]:
    """How unevenly `ranks` processes that share out the experts compute: {tag: largest over mean, less one}.

    loads: layer -> each expert's share of the assignments, as `RouterReport` has them; a process owns a run of
    E / ranks experts. Each waits for the one that has most, in every layer. Nothing for one process.
    """
    if ranks == 1 or not loads:
        return {}
    found = {}
    for layer, shares in sorted(loads.items()):
        found[f"moe/layer_{layer:02d}/rank_violation"] = violation(shares, contiguous(shares, ranks), ranks)
    return found | {"moe/mean/rank_violation": sum(found.values()) / len(found)}


def _distribution(routing: Routing) -> Tensor | None:
    """The router's scores normalised over the experts: [T, E], or None when it has none."""
    if routing.scores is not None:
        scores = routing.scores.float()
        return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return None if routing.logits is None else routing.logits.float().softmax(-1)


def _token_sums(routing: Routing, probability: Tensor | None) -> Tensor:
    """[SUMS] float64: token entropy, top-k mass, tokens, dropped, each summed over the unmasked tokens."""
    device = routing.weight.device
    mask = routing.token_mask
    if mask is None:
        mask = torch.ones(routing.num_tokens, dtype=torch.bool, device=device)
    if probability is None:
        entropy = torch.zeros((), dtype=torch.float64, device=device)
        chosen = routing.weight
    else:
        per_token = torch.special.entr(probability).sum(-1)  # [T], entr(0) = 0
        entropy = torch.where(mask, per_token, 0.0).sum(dtype=torch.float64)  # where: padding may hold NaN
        chosen = probability[routing.token, routing.expert]  # [N]
    counted = mask[routing.token] if routing.served is None else mask[routing.token] & routing.served
    mass = torch.where(counted, chosen, 0.0).sum(dtype=torch.float64)
    dropped = torch.zeros_like(entropy) if routing.dropped is None else routing.dropped.double()
    return torch.stack([entropy, mass, mask.sum().double(), dropped])


def _load_metrics(counts: list[float]) -> dict[str, float]:
    """Of the counts alone; they must not all be zero."""
    total, experts = sum(counts), len(counts)
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    return {
        "max_violation": max(counts) * experts / total - 1,  # Wang et al. 2408.15664, eq. 4
        "dead_fraction": sum(count == 0 for count in counts) / experts,
        "load_entropy": entropy / math.log(experts) if experts > 1 else 1.0,  # one expert is always balanced
    }


def _token_metrics(layer: _Layer, served: float, sums: list[float]) -> dict[str, float]:
    entropy, mass, tokens, dropped = sums
    metrics = {"top_k_mass": mass / tokens}
    if layer.has_distribution:
        metrics["router_entropy"] = entropy / tokens
    if layer.is_ragged:
        metrics["experts_per_token"] = served / tokens
    if layer.has_drops:
        metrics["dropped_fraction"] = dropped / (served + dropped)
    return metrics


def _mean_over_layers(per_layer: list[dict[str, float]]) -> Iterable[tuple[str, float]]:
    """Each metric averaged over the layers that have it, unweighted."""
    for key in dict.fromkeys(key for values in per_layer for key in values):
        present = [values[key] for values in per_layer if key in values]
        yield key, sum(present) / len(present)
