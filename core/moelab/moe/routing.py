"""What a router decides, in one form for every kind of routing.

T tokens, E experts, K experts per token, N assignments (T * K when every token has exactly K).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenInfo:
    """What a router may know of its tokens beside their hidden states. All tensors are [T]."""

    token_id: Tensor  # int64
    document_id: Tensor  # int64
    domain_id: Tensor  # int64
    position: Tensor  # int64, within the sequence
    sequence_id: Tensor  # int64, which sequence of the batch the token stands in
    mask: Tensor | None = None  # bool, False for padding; None: no padding
    training: bool = False
    generator: torch.Generator | None = None  # for noise; seeded by (seed, step, micro-batch)


@dataclass(frozen=True)
class Routing:
    """N assignments of tokens to experts.

    `top_k` is set when every token has exactly that many, in token order: then combining is a reshape
    and a sum. `scores` and `logits` are what losses and observers look at; a router that has none
    leaves them None, and a loss that needs them refuses it.
    """

    token: Tensor  # [N] int64
    expert: Tensor  # [N] int64, 0 .. num_experts - 1
    weight: Tensor  # [N] fp32, differentiable
    num_tokens: int
    num_experts: int
    top_k: int | None = None
    scores: Tensor | None = None  # [T, E] fp32, non-negative
    logits: Tensor | None = None  # [T, E] fp32
    token_mask: Tensor | None = None  # [T] bool, False for padding
    dropped: Tensor | None = None  # scalar int64: assignments wanted but not served, e.g. over capacity
    extras: dict[str, Tensor] = field(default_factory=dict)  # what a router and a loss of one plugin share

    @classmethod
    def from_topk(
        cls,
        expert: Tensor,
        weight: Tensor,
        num_experts: int,
        *,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Exactly K experts per token: expert [T, K] int64, weight [T, K]."""
        tokens, top_k = expert.shape
        token = torch.arange(tokens, device=expert.device).repeat_interleave(top_k, output_size=tokens * top_k)
        return cls(
            token, expert.reshape(-1), weight.reshape(-1), tokens, num_experts,
            top_k=top_k, scores=scores, logits=logits, token_mask=token_mask,
        )  # fmt: skip

    @classmethod
    def from_assignments(
        cls,
        token: Tensor,
        expert: Tensor,
        weight: Tensor,
        num_tokens: int,
        num_experts: int,
        *,
        scores: Tensor | None = None,
        logits: Tensor | None = None,
        token_mask: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Routing:
        """Any number of experts per token, none included: token, expert, weight are [N]."""
        return cls(
            token, expert, weight, num_tokens, num_experts,
            scores=scores, logits=logits, token_mask=token_mask, dropped=dropped,
        )  # fmt: skip

    def counts(self) -> Tensor:
        """How many assignments each expert has from tokens that are not padding: [E] int64."""
        ones = torch.ones_like(self.expert)
        if self.token_mask is not None:
            ones = self.token_mask.to(ones.dtype).index_select(0, self.token)
        return torch.zeros(self.num_experts, dtype=torch.int64, device=self.expert.device).index_add_(
            0, self.expert, ones
        )


@dataclass(frozen=True)
class LayerRecord:
    """What one MoE layer tells beside its output. Returned up through the model, never kept on a module."""

    layer_id: int
    routing: Routing
    counts: Tensor  # [E] int64, padding excluded
    router_weight: Tensor | None = None  # [E, D], when the router offers `weight`: for losses on the router itself
