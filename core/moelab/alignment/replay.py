"""Record and replay: experts that another pass chose, in the pass that is trained.

A policy that is trained on routes other than those it wrote with, or than its reference's, compares different networks.
Rollout routing replay (R3, 2510.11370, as references tell it; not opened) keeps the recorded choice and lets the
router's own scores weigh it, so that the router learns. With equal weights the logits are the same bits.

R rows of S positions, T = R * S tokens, K experts a token; routers of a fixed K alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.routing import LayerRecord, Routing, TokenInfo
from moelab.nn.count import moe_blocks
from moelab.nn.transformer import Transformer

Weigh = Callable[[Tensor, Tensor], Tensor]  # `Router.weigh`


@dataclass(frozen=True)
class Replayed:
    """The routing override of a pass: recorded experts, weighed by the router that is overridden.

    `own`: what the routers themselves had chosen, layer after layer, for who looks at how far they have moved.
    """

    weigh: Mapping[int, Weigh]
    expert: Mapping[int, Tensor]  # layer -> [T, K] int64
    known: Tensor | None = None  # [T] bool: tokens without a record keep their router's; None: all have one
    own: dict[int, Routing] = field(default_factory=dict)

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing:
        self.own[layer_id] = routing
        recorded = self.expert.get(layer_id)
        if recorded is None:
            return routing
        chosen = routing.expert.view(recorded.shape)
        expert = recorded if self.known is None else torch.where(self.known[:, None], recorded, chosen)
        assert routing.scores is not None, "check_replayable was not asked"
        weight = self.weigh[layer_id](routing.scores, expert)
        return replace(routing, expert=expert.reshape(-1), weight=weight.reshape(-1))

    def owned(self, records: Sequence[LayerRecord]) -> list[LayerRecord]:
        """The records as if nothing had been replayed."""
        return [replace(record, routing=self.own[record.layer_id]) for record in records]


def weighers(model: Transformer) -> dict[int, Weigh]:
    """{layer: `weigh` of its router}. Raises ConfigError naming a router whose routes can't be replayed."""
    found: dict[int, Weigh] = {}
    for block in moe_blocks(model):
        weigh = getattr(block.router, "weigh", None)
        if not callable(weigh):
            raise ConfigError(
                f"{block.parts['router'].title}: its routes can't be replayed while it is trained: it has no "
                "`weigh`, or gives tokens different numbers of experts; set replay: none"
            )
        found[block.layer_id] = weigh
    return found


def recorded(records: Sequence[LayerRecord]) -> dict[int, Tensor]:
    """{layer: expert [T, K]} of a pass."""
    found = {}
    for record in records:
        routing = record.routing
        assert routing.top_k is not None, "weighers was not asked"
        found[record.layer_id] = routing.expert.view(routing.num_tokens, routing.top_k)
    return found
