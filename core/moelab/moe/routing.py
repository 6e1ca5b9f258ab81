"""What a router decides, in one form for every kind of routing.

T tokens, E experts, K experts per token, N assignments (T * K when every token has exactly K), D hidden size.
E' choices: the E experts, followed by whatever a router offers beside them (null, copy or constant experts).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

FEW = 512  # assignments of a pass without gradients: which tokens they are of is kept from pass to pass
MAP = "balance_map"  # in `Routing._made`


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
    num_sequences: int | None = None  # sequences in the batch; None: asked of `sequence_id`, which waits for the device
    previous: Routing | None = None  # what the nearest MoE layer below decided, for routers that build on it
    measure: bool = False  # the layer's record holds the norms of its outputs: for a look between steps
    routing_override: RoutingOverride | None = None  # asked after the router, and obeyed in its place; None: nobody is

    def sequence_shape(self) -> tuple[int, int]:
        """(B, S) when the T tokens are B sequences of S positions, padding included, one after the other."""
        tokens = self.sequence_id.shape[0]
        count = self.num_sequences
        if count is None:
            count = int(self.sequence_id.max()) + 1 if tokens else 1
        assert tokens % max(count, 1) == 0, f"{tokens} tokens are no {count} sequences of one length"
        return count, tokens // count

    def valid(self) -> Tensor:
        """[T] bool, True for real tokens."""
        return torch.ones_like(self.sequence_id, dtype=torch.bool) if self.mask is None else self.mask


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
    scores: Tensor | None = None  # [T, E'] fp32, non-negative
    logits: Tensor | None = None  # [T, E'] fp32
    token_mask: Tensor | None = None  # [T] bool, False for padding
    dropped: Tensor | None = None  # scalar int64: assignments wanted but not served, e.g. over capacity
    served: Tensor | None = None  # [N] bool, False: a placeholder of weight 0 that keeps N static; it counts nowhere
    choices: Tensor | None = None  # [T, E'] bool, what was asked for before drops; None: what is served
    balance_top_k: int | None = None  # balance losses count so many of the best scores; see `balance_map`
    bypass: Tensor | None = None  # [T, D] added to the output: what tokens get without an expert (copy, constant)
    statistics: Tensor | None = None  # [M] fp32, detached: its mean over the batch goes to `Router.after_step`
    extras: dict[str, Tensor] = field(default_factory=dict)  # what a router and a loss of one plugin share
    weights_on_input: bool = (
        False  # each expert sees its weight times x, and is added as it is (Llama 4); else after it
    )
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        balance_top_k: int | None = None,
        weights_on_input: bool = False,
    ) -> Routing:
        """Exactly K experts per token: expert [T, K] int64, weight [T, K]."""
        tokens, top_k = expert.shape
        token = _tokens_of(tokens, top_k, expert)
        return cls(
            token, expert.reshape(-1), weight.reshape(-1), tokens, num_experts,
            top_k=top_k, scores=scores, logits=logits, token_mask=token_mask,
            balance_top_k=balance_top_k, weights_on_input=weights_on_input,
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

    def serve(self, served: Tensor) -> Routing:
        """Make placeholders of the assignments where `served` [N] bool is False: weight 0, counted nowhere.

        Keeps N static, so that nothing waits for the device; `compact` removes them where waiting is free.
        """
        both = served if self.served is None else served & self.served
        return replace(self, weight=torch.where(both, self.weight, torch.zeros_like(self.weight)), served=both)

    def compact(self) -> Routing:
        """The same routing without its placeholders. Waits for the device to learn how many there are."""
        if self.served is None:
            return self
        keep = self.served.nonzero().squeeze(-1)
        return replace(
            self, token=self.token[keep], expert=self.expert[keep], weight=self.weight[keep], top_k=None, served=None
        )

    def counts(self) -> Tensor:
        """How many assignments each expert serves to tokens that are not padding: [E] int64."""
        counted = torch.ones_like(self.expert)
        if self.token_mask is not None:
            counted = self.token_mask.to(counted.dtype).index_select(0, self.token)
        if self.served is not None:
            counted = counted * self.served
        empty = torch.zeros(self.num_experts, dtype=torch.int64, device=self.expert.device)
        return empty.index_add_(0, self.expert, counted)

    def demand(self) -> Tensor:
        """How often each choice was asked for by tokens that are not padding, before drops: [E'] int64."""
        if self.choices is None:
            return self.counts()
        choices = self.choices if self.token_mask is None else self.choices & self.token_mask.unsqueeze(-1)
        return choices.sum(0)

    def choice_map(self) -> Tensor:
        """[T, E'] bool: which choices each token asked for, before drops; none for padding."""
        choices = self.choices
        if choices is None:
            served = torch.ones_like(self.expert, dtype=torch.bool) if self.served is None else self.served
            choices = torch.zeros(self.num_tokens, self.num_experts, dtype=torch.int64, device=self.expert.device)
            choices = choices.index_put_((self.token, self.expert), served.long(), accumulate=True) > 0
        return choices if self.token_mask is None else choices & self.token_mask.unsqueeze(-1)

    @property
    def counted_top_k(self) -> int:
        """How many of a token's best scores balance losses count; 0: they count `choice_map`.

        Undecided (`balance_top_k` None), it is `top_k` where the router gives scores and says nothing of its choices:
        what else moved them, a bias or limits to groups, is not the balance of the scores.
        """
        if self.balance_top_k is not None:
            return self.balance_top_k
        undecided = self.scores is not None and self.choices is None and self.served is None
        return self.top_k if undecided and self.top_k is not None else 0

    @property
    def balance_map(self) -> Tensor:
        """[T, E'] bool: which choices of each token balance losses count; none for padding. Computed when first asked.

        The best `counted_top_k` scores without bias and groups (DeepSeek-V3 2412.19437 eq. 18; Megatron-Core's
        compute_routing_scores_for_aux_loss): once a bias evens out who is chosen, the choices are balanced, and a loss
        that counts them teaches the scores nothing.
        """
        if MAP not in self._made:  # no functools.cached_property: its lock, before Python 3.12, stops torch.compile
            self._made[MAP] = self._balance_map()
        return self._made[MAP]

    def _balance_map(self) -> Tensor:
        top_k = self.counted_top_k
        if top_k == 0 or self.scores is None:
            return self.choice_map()
        best = self.scores.detach().topk(top_k, dim=-1).indices
        found = torch.zeros_like(self.scores, dtype=torch.bool).scatter_(1, best, True)
        return found if self.token_mask is None else found & self.token_mask.unsqueeze(-1)


def _tokens_of(tokens: int, top_k: int, like: Tensor) -> Tensor:
    """0, 0, .., 1, 1, ..: each of `tokens` `top_k` times, [tokens * top_k] int64. Written over by nobody."""
    few = type(like) is Tensor and like.device.type == "cpu" and tokens * top_k <= FEW
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _few_tokens(tokens, top_k)
    return torch.arange(tokens, device=like.device).repeat_interleave(top_k, output_size=tokens * top_k)


@lru_cache(maxsize=64)
def _few_tokens(tokens: int, top_k: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor made within may be read in training too
        return torch.arange(tokens, device="cpu").repeat_interleave(top_k)


class RoutingOverride(Protocol):
    """Says where tokens go instead of where the router sent them: replayed, removed, swapped (`moe/overrides.py`).

    `(layer_id, routing, x [T, D], info) -> Routing` of the same T and E. What it leaves of `routing` stays: `bypass`,
    what copy and constant experts add, is the router's own. Called in the forward pass of every MoE layer, so it waits
    for no device and loops over no tokens. Records, and with them balance losses and counts, hold what it returns.
    """

    def __call__(self, layer_id: int, routing: Routing, x: Tensor, info: TokenInfo) -> Routing: ...


@dataclass(frozen=True)
class LayerRecord:
    """What one MoE layer tells beside its output. Returned up through the model, never kept on a module."""

    layer_id: int
    routing: Routing
    counts: Tensor  # [E] int64, assignments served, padding excluded
    router_weight: Tensor | None = None  # [E, D], when the router offers `weight`: for losses on the router itself
    demand: Tensor | None = None  # [E'] int64, assignments asked for, padding excluded; None: the same as `counts`
    info: TokenInfo | None = None  # of the layer's tokens
    # [E, 2F, D], the experts' own parameters: for losses on the experts. Over several processes gathered for those that
    # say `needs_expert_weights`, and for observers of a probe; None otherwise.
    gate_up: Tensor | None = None
    down: Tensor | None = None  # [E, F, D]
    routed_norm: Tensor | None = None  # [T] fp32, L2 norm of what experts and bypass gave; only where it was asked for
    shared_norm: Tensor | None = None  # [T] fp32, the same of the shared expert

    @property
    def wanted(self) -> Tensor:
        """[E'] int64: what was asked for, before drops; what `Router.after_step` is told."""
        return self.counts if self.demand is None else self.demand

    @property
    def balance_counts(self) -> Tensor:
        """[E'] int64: what balance losses count, `Routing.balance_map` over tokens; the same as `wanted` for most."""
        return self.routing.balance_map.sum(0) if self.routing.counted_top_k else self.wanted
