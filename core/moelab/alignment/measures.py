"""How a policy's routes stand to its reference's, and what experts do for chosen against rejected answers.

Sums on the device; the host waits once, in `RouteMeasures.metrics`. T tokens, E' choices of a router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelab.moe.routing import LayerRecord, Routing

PREFIX = "moe/layer_{:02d}/"


def overlap(a: Routing, b: Routing) -> Tensor:
    """[T] fp32: of the choices of two routers for the same tokens, |A and B| / max(|A|, |B|); 1 where both chose none.

    For routers that choose K each that is the share of the top K that agrees; of a padding token it is 1.
    """
    mine, other = a.choice_map(), b.choice_map()
    both = (mine & other).sum(-1)
    most = torch.maximum(mine.sum(-1), other.sum(-1))
    return torch.where(most > 0, both / most.clamp_min(1), torch.ones_like(both, dtype=torch.float32))


def load_of(record: LayerRecord, tokens: Tensor) -> Tensor:
    """[E'] int64: how often each choice was asked for by `tokens` [T] bool that are not padding."""
    return (record.routing.choice_map() & tokens[:, None]).sum(0)


class RouteMeasures:
    """Sums over micro-batches; `metrics` gives the numbers of docs/alignment.md and starts over."""

    def __init__(self) -> None:
        self._overlap: dict[int, Tensor] = {}  # layer -> [2] float64: agreement summed over tokens, tokens
        self._loads: dict[int, Tensor] = {}  # layer -> [2, E'] int64: of chosen and of rejected answers

    @torch.no_grad()
    def add_reference(self, policy: Sequence[LayerRecord], reference: Sequence[LayerRecord]) -> None:
        """Records of the same tokens. Layers are paired by number; a layer that only one has says nothing."""
        theirs = {record.layer_id: record.routing for record in reference}
        for record in policy:
            other = theirs.get(record.layer_id)
            if other is None or other.num_experts != record.routing.num_experts:
                continue
            mask = record.routing.token_mask
            agreed = overlap(record.routing, other)
            real = torch.ones_like(agreed) if mask is None else mask.to(agreed.dtype)
            sums = torch.stack([(agreed * real).sum(dtype=torch.float64), real.sum(dtype=torch.float64)])
            self._overlap[record.layer_id] = self._overlap.get(record.layer_id, 0) + sums

    @torch.no_grad()
    def add_pairs(self, records: Sequence[LayerRecord], completion: Tensor) -> None:
        """completion [2 P, S] bool or int: the answers' tokens, P chosen sequences before P rejected ones.

        A prompt stands in both halves; only the answers' tokens count.
        """
        half = completion.shape[0] // 2
        rows = torch.zeros_like(completion, dtype=torch.bool)
        rows[:half] = True
        answers = completion.bool().flatten()
        for record in records:
            loads = torch.stack([load_of(record, answers & side.flatten()) for side in (rows, ~rows)])
            self._loads[record.layer_id] = self._loads.get(record.layer_id, 0) + loads

    def metrics(self) -> dict[str, float]:
        """By tag. Waits for the device. A layer without tokens has none."""
        found: dict[str, float] = {}
        for layer, sums in sorted(self._overlap.items()):
            agreed, tokens = sums.tolist()
            if tokens:
                found[PREFIX.format(layer) + "route_agreement"] = agreed / tokens
        for layer, loads in sorted(self._loads.items()):
            shares = loads.double() / loads.sum(-1, keepdim=True).clamp_min(1)
            if bool((loads.sum(-1) > 0).all()):
                # Total variation: the share of assignments that would have to move to make the loads equal.
                found[PREFIX.format(layer) + "chosen_rejected_load"] = float((shares[0] - shares[1]).abs().sum()) / 2
        self._overlap, self._loads = {}, {}
        return found | _means(found)


def _means(found: dict[str, float]) -> dict[str, float]:
    """Each number averaged over the layers that have it."""
    by_key: dict[str, list[float]] = {}
    for tag, value in found.items():
        by_key.setdefault(tag.rpartition("/")[2], []).append(value)
    return {f"moe/mean/{key}": sum(values) / len(values) for key, values in by_key.items()}
