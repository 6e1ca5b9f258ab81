"""Other routes for a frozen model: experts removed, a layer silenced, the next best or random experts instead.

T tokens, N assignments, E experts, K slots for each token. Each is a `RoutingOverride` for one layer; `ByLayer` puts
several together. What a router computes for tokens without an expert (`Routing.bypass`: copy and constant experts of
MoE++) is not an assignment, and stays. None waits for the device.

Alternatives are of equal compute: a token keeps its number of experts and the weights of its slots, and other experts
stand in them, the best first, as the router puts its own. So what changes is who computes, not how much nor how loud.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.routing import Routing, RoutingOverride, TokenInfo
from moelab.seeds import derive_seed

_WORD, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9
_MIX = 0x45D9F3B  # odd, and of 27 bits: its product with 32 bits stays below 2^63


@dataclass(frozen=True)
class ByLayer:
    """Each layer's own override; layers without one keep their routers' routes."""

    overrides: Mapping[int, RoutingOverride]

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        override = self.overrides.get(layer_id)
        return routing if override is None else override(layer_id, routing, x, info)


@dataclass(frozen=True)
class Remove:
    """Assignments to `experts` are not served.

    `renormalise`: what a token has left is scaled to the sum that its weights had, so the layer stays as loud; else it
    is left as it is, which is the expert's output taken for zero. A token of whose experts none is left gets nothing.
    """

    experts: Collection[int]
    renormalise: bool = True
    _kept: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        fewer = routing.serve(self._mask(routing).index_select(0, routing.expert))
        return scaled_as(fewer, routing) if self.renormalise else fewer

    def _mask(self, routing: Routing) -> Tensor:
        """[E] bool, brought to the device once: a copy to it waits."""
        kind = (routing.num_experts, routing.expert.device)
        if kind not in self._kept:
            kept = [expert not in self.experts for expert in range(routing.num_experts)]
            self._kept[kind] = torch.tensor(kept, device=routing.expert.device)
        return self._kept[kind]


@dataclass(frozen=True)
class RemoveAll:
    """No assignment of the layer is served: what is left is its shared expert, and the router's bypass."""

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        return routing.serve(torch.zeros_like(routing.expert, dtype=torch.bool))


@dataclass(frozen=True)
class RemoveAtRandom:
    """As `Remove`, of a share of the assignments picked by chance: the control for experts that carry this share."""

    share: float  # 0 .. 1
    seed: int = 0
    renormalise: bool = True

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        drawn = hashed_uniform(info, routing.num_experts, derive_seed(self.seed, "remove", layer_id))
        fewer = routing.serve(drawn[routing.token, routing.expert] >= self.share)
        return scaled_as(fewer, routing) if self.renormalise else fewer


@dataclass(frozen=True)
class NextBest:
    """The last `replaced` experts of each token give way to the best that it did not choose; None: all of them do.

    "Best" by `Routing.scores`, without a selection bias. Where fewer than wanted are left, the others stay.
    """

    replaced: int | None = None

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        expert, served = _slots(routing, layer_id)
        scores = _scores(routing, layer_id)
        others = scores.masked_fill(_chosen(expert, served, routing.num_experts), float("-inf"))
        width = min(expert.shape[1], routing.num_experts)
        best = others.topk(width, dim=-1)  # [T, K]
        place = served.long().cumsum(-1) - 1  # which of the token's experts, from 0
        count = served.sum(-1, keepdim=True)
        leaving = count if self.replaced is None else count.clamp_max(self.replaced)
        nth = place - (count - leaving)  # 0: takes the best of the others
        found = best.values.gather(1, nth.clamp(0, width - 1)) > float("-inf")
        moves = served & (nth >= 0) & found
        return _reassigned(routing, torch.where(moves, best.indices.gather(1, nth.clamp(0, width - 1)), expert))


@dataclass(frozen=True)
class Sampled:
    """As many experts as the token had, drawn without replacement.

    `temperature`: in proportion to scores^(1 / temperature), by Gumbel noise on their logarithms and the largest K
    (Kool et al. 1903.06059, abstract opened); None: uniformly, whatever the router says, so that no scores are needed.
    """

    seed: int = 0
    temperature: float | None = None

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        expert, served = _slots(routing, layer_id)
        drawn = hashed_uniform(info, routing.num_experts, derive_seed(self.seed, "routes", layer_id))
        if self.temperature is None:
            key = drawn
        else:
            key = _scores(routing, layer_id).log() / self.temperature - (-drawn.log()).log()
        order = key.topk(min(expert.shape[1], routing.num_experts), dim=-1).indices  # [T, K]
        if self.temperature is not None:  # the best first
            count = served.sum(-1, keepdim=True)
            value = _scores(routing, layer_id).gather(1, order)
            rank = torch.arange(order.shape[1], device=order.device)
            value = value.masked_fill(rank >= count, float("-inf"))  # drawn, but of more than the token has slots for
            order = order.gather(1, value.argsort(dim=-1, descending=True, stable=True))
        place = (served.long().cumsum(-1) - 1).clamp_min(0)
        return _reassigned(routing, torch.where(served, order.gather(1, place), expert))


def scaled_as(fewer: Routing, routing: Routing) -> Routing:
    """`fewer` with each token's weights scaled to their sum in `routing`; a token with none left keeps none."""
    sums = []
    for one in (routing, fewer):
        total = torch.zeros(one.num_tokens, dtype=one.weight.dtype, device=one.weight.device)
        sums.append(total.index_add(0, one.token, one.weight))
    before, after = sums
    factor = torch.where(after == 0, torch.ones_like(after), before / torch.where(after == 0, 1.0, after))
    factor = torch.where(before == after, torch.ones_like(factor), factor)  # untouched tokens keep their bits
    return replace(fewer, weight=fewer.weight * factor.index_select(0, fewer.token))


def hashed_uniform(info: TokenInfo, columns: int, seed: int) -> Tensor:
    """[T, columns] float64 in 0 .. 1 exclusive, a function of (token id, document, position, column, seed) alone.

    Not of a generator: the draw is then the same whatever the batch size, and for every layer that asks again.
    """
    key = _mixed(info.token_id * 1_000_003 + info.position * 7_919 + info.document_id * 15_485_863)
    key = _mixed(key ^ (seed & _WORD))
    column = torch.arange(columns, device=key.device) * _GOLDEN
    return (_mixed(key[:, None] + column).double() + 0.5) / (_WORD + 1)


def _mixed(key: Tensor) -> Tensor:
    """int64 -> 0 .. 2^32 - 1, every bit of the low word in each: a multiply-shift hash, as in forced_random."""
    key = key & _WORD
    for _ in range(3):
        key = ((key ^ (key >> 16)) * _MIX) & _WORD
    return key ^ (key >> 16)


def _slots(routing: Routing, layer_id: int) -> tuple[Tensor, Tensor]:
    """(expert [T, K], served [T, K] bool)."""
    if routing.top_k is None:
        raise ConfigError(
            f"layer {layer_id}: its router hands out assignments and no slots for each token, so there are no "
            "alternatives of equal compute; remove experts instead"
        )
    shape = (routing.num_tokens, routing.top_k)
    served = torch.ones_like(routing.expert, dtype=torch.bool) if routing.served is None else routing.served
    return routing.expert.view(shape), served.view(shape)


def _scores(routing: Routing, layer_id: int) -> Tensor:
    """[T, E], without the choices that are no experts."""
    if routing.scores is None:
        raise ConfigError(f"layer {layer_id}: its router gives no scores, so there is no next best; use random routes")
    return routing.scores.detach()[:, : routing.num_experts]


def _chosen(expert: Tensor, served: Tensor, num_experts: int) -> Tensor:
    """expert, served [T, K] -> [T, E] bool."""
    count = torch.zeros(len(expert), num_experts, dtype=torch.int64, device=expert.device)
    return count.scatter_add(1, expert, served.long()) > 0


def _reassigned(routing: Routing, expert: Tensor) -> Routing:
    """expert [T, K] in the slots of `routing`; what it asked for is then what it serves."""
    return replace(routing, expert=expert.reshape(-1), choices=None)
