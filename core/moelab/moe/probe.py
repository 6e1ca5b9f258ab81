"""What observers are shown of a fixed batch between steps: who went where, of which token, from which domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.moe.routing import LayerRecord, Routing


@dataclass(frozen=True)
class Probe:
    """One forward pass in evaluation mode, without gradients; the same held-out tokens at every look, no padding.

    T tokens. The records hold `routed_norm` and `shared_norm`, and the experts' own parameters: read, don't write.
    """

    records: Sequence[LayerRecord]  # of the MoE layers, in order
    token_id: Tensor  # [T] int64
    domain_id: Tensor  # [T] int64, index of `domains`
    domains: Sequence[str]


def served_map(routing: Routing) -> Tensor:
    """[T, E] bool: which experts each token was served by; what the papers call its activated experts."""
    served = torch.ones_like(routing.expert, dtype=torch.bool) if routing.served is None else routing.served
    found = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.int64, device=routing.expert.device)
    found.index_put_((routing.token, routing.expert), served.long(), accumulate=True)
    return found > 0
