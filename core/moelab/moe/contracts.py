"""The contracts between a MoE layer and its parts. A plugin provides one of these.

T tokens, D hidden size, E experts, K experts per token, F expert width, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from moelab.moe.activation import Activation, SwiGLU
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import LayerRecord, Routing, TokenInfo

if TYPE_CHECKING:
    from moelab.moe.experts import ExpertBank


@dataclass(frozen=True)
class MoEContext:
    """What a router or a shared expert may depend on when it is built."""

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int  # of the dense FFN
    layer_id: int
    num_hidden_layers: int
    vocab_size: int
    initializer_range: float = 0.02
    allow_noncausal: bool = False  # a router that looks at later tokens must refuse to be built without it
    activation: Activation = field(default_factory=SwiGLU)  # of every feed-forward part of the model ...
    mlp_bias: bool = False  # ... and whether its matrices have biases: a shared expert takes both


@dataclass(frozen=True)
class ExpectedAssignments:
    """How many real experts a router expects to serve to a token in training: what is known before a run.

    Null, copy and constant experts are none. A run counts what it served, from its records alone.
    """

    per_token: float  # 0 .. E, the mean over tokens
    because: str  # the formula and what it rests on, as `moelab explain` tells it
    settled: bool = True  # False: training decides, and `because` says what the number is then


@runtime_checkable
class Router(Protocol):
    """An nn.Module. `forward(x [T, D], info) -> Routing`.

    Optional, looked up by name:
    - `weight`: Parameter [E, D], the projection; Hugging Face's `mlp.gate.weight`.
    - `initialise(generator)`: fill its parameters in place; without it N(0, initializer_range) for every matrix.
    - `after_step(counts [E'] int64, statistics [M] fp32 or None)`: called once after each optimizer step. counts: what
      was asked for in the whole batch, over micro-batches and ranks, padding excluded (`LayerRecord.wanted`);
      statistics: the mean of `Routing.statistics` over the batch's tokens, for a router that returns some. One that
      also takes `step: int` is told which step it was, counted from 0: what follows a schedule needs no state.
    - `expected_assignments`: ExpectedAssignments, where that is not the layout's num_experts_per_tok. FLOPs and active
      parameters that are told before a run rest on it. What the router itself multiplies, every token pays: each of
      its parameters with two or more axes counts as a matmul.
    - `learns`: False for a router that follows a fixed rule by design (hash): said as a fact wherever the run is
      judged, where a router that was to learn and does not raises an alarm. One without parameters need not say it.
    - `causal`: False for a router in whose training a token's experts depend on later tokens; it refuses to be built
      without `allow_noncausal`. `causal_in_evaluation`: False where they do in evaluation too, so that its held-out
      loss sees the future. A run looks whether that is true, tells what is declared, and refuses what is not.
    - `batch_invariant`: False for a router in whose training a token's experts depend on the batch's other sequences,
      or on noise, which is laid over the batch; without it the same as `causal`. Log-probabilities then hang on these,
      and what compares them (DPO) refuses it by name.
    - `weigh(scores [T, E'], expert [T, K]) -> [T, K]`: the weights that it gives experts which something else chose, of
      its own scores; without it recorded routes can't be replayed while it learns.
    - `expert_rows`: ExpertRows (`moe/surgery.py`), which of its tensors have a row for each expert, or in words why
      they can't be cut so; without it its experts can't be operated on (`moelab surgery`), unless it has no tensors.
    - `forced`: True for a router that ignores its input and balances by force; marked FORCED wherever a run is named.
    - `qwen2_moe_fields() -> dict | str`: the fields of a Qwen2-MoE config.json that describe this router, or
      why there are none; without it a checkpoint can't be exported to that format.
    """

    def __call__(self, x: Tensor, info: TokenInfo) -> Routing: ...


@runtime_checkable
class SharedExpert(Protocol):
    """An nn.Module: x [T, D] -> [T, D], added to the routed output. May offer `qwen2_moe_fields` as a router does.

    `intermediate_size` is the number of neurons that each token passes through, for counting FLOPs.
    Optional, looked up by name, of routers too, for generation, where looking things up takes as long as computing:
    - `reading_input() -> tuple[Tensor, ...]`: the matrices that read x as it is; their products are made one, of which
      `moe.thin_product.joined_product` gives each its part.
    - `serving() -> (base [T, D], x [T, D]) -> base + y`, of a router `(x, info) -> Routing`, or None: the same as a
      call in evaluation, with everything looked up beforehand (`moe.thin_product.reader`, `adder`). Asked for once for
      each batch of texts; a part with a hook is called as it is.
    """

    intermediate_size: int

    def __call__(self, x: Tensor) -> Tensor: ...


class Latent(Protocol):
    """An nn.Module around the experts: x [T, D] -> down [T, L] -> the experts -> up [T, D]."""

    def down(self, x: Tensor) -> Tensor: ...

    def up(self, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class BalanceContext:
    """What a balance loss is told about the batch that its micro-batch belongs to."""

    # layer -> [E'] int64 over all micro-batches and ranks. None: the records are the whole batch; or the same as counts
    batch_counts: Mapping[int, Tensor] | None  # `LayerRecord.balance_counts`
    batch_tokens: Tensor | None = None  # scalar: unmasked tokens of the whole batch
    batch_choices: Mapping[int, Tensor] | None = None  # `LayerRecord.wanted`
    batch_own: Mapping[int, Tensor] | None = None  # layer -> [M] int64, what this loss counts itself; None: as above


@runtime_checkable
class BalanceLoss(Protocol):
    """`(records, context) -> scalar`: the mean over this micro-batch's unmasked tokens, unweighted.

    The trainer multiplies by the coefficient and by this micro-batch's share of the batch's tokens, so
    that any split into micro-batches sums to the same loss. A config may give any loss a `schedule` and `layers`
    beside its own options; the core takes care of those.

    Optional, looked up by name:
    - `after_step(context)`: called once after each optimizer step with the whole batch's counts, to adapt `weight`.
    - `batch_count(record) -> [M] int64`: what it needs counted over the whole batch beside the experts' loads, tokens
      by group of experts say; without a wait for the device. Its sums are `context.batch_own`.
    - `shardable`: False for one that can't be laid over several processes (a router, shared expert or backend says it
      alike): it needs weights that no process holds whole, or decides by its data whether a parameter is used.
    - `needs_expert_weights`: True for one that reads `LayerRecord.gate_up` or `down`, which over several processes are
      gathered for it, in every forward pass.
    - `split_invariant`: False for a loss whose total depends on how the batch is split into micro-batches.
    - `state_dict()` and `load_state_dict(state)`: what it must remember over a restart.
    - `qwen2_moe_fields() -> dict | str`: its `router_aux_loss_coef` in a Qwen2-MoE config.json, or why it has none.
    """

    weight: float  # the coefficient; applied by the trainer, never by the loss itself
    needs_batch_counts: bool  # True: counted over the whole batch before any backward pass

    def __call__(self, records: Sequence[LayerRecord], context: BalanceContext) -> Tensor: ...


@dataclass(frozen=True)
class BalanceLossContext:
    """What a balance loss may depend on when it is built."""

    layouts: Mapping[int, ExpertLayout]  # of the MoE layers it applies to, by layer


@dataclass(frozen=True)
class BackendContext:
    """What an expert backend may depend on when it is built."""

    layout: ExpertLayout
    hidden_size: int  # of what the experts read and write
    layer_id: int
    others: Callable[[], Mapping[str, ExpertBackend]]  # every other backend, built with its defaults, for one that
    # hands on; when it is called, not before: others may ask the same


@dataclass(frozen=True)
class ExpertProblem:
    """One call of a backend, as far as it decides who can serve it."""

    num_experts: int
    hidden_size: int  # of what the experts read and write
    moe_intermediate_size: int
    num_tokens: int
    num_assignments: int
    device: torch.device
    dtype: torch.dtype
    activation: Activation = field(default_factory=SwiGLU)
    bias: bool = False  # whether the bank has biases


@runtime_checkable
class ExpertBackend(Protocol):
    """Computes y[t] = sum over t's assignments of weight * down(activation(gate x_t, up x_t)). Owns no parameters.

    Activation and biases are the bank's (`bank.activate`, `add_up_bias`, `add_down_bias` of moelab.moe.experts); one
    that can't compute all of them says so in `supports`, and the conformance kit looks whether it is true.
    One that leaves a few tokens without gradients to `moe/few_rows.py` says `hands_over_few_rows = True`.
    One that in training also computes, forward, the experts that a token did not take says so with
    `computes_every_expert = True`; its FLOPs are counted then. One that on a CPU keeps no more for the backward pass
    than x and the gate_up rows says `keeps_gate_up_alone = True`, and is planned so (`moelab plan`). Where whole
    experts lie on other processes, a backend is handed the rows that came to its own, with weights of 1, and knows
    nothing more of their tokens. One that must know
    more and hands on to another backend has `around(wrap) -> ExpertBackend`: itself at home, with `wrap` around that
    one, which rows leave through. One that can't be dealt out so says `dealable = False`, and is refused there.
    """

    name: str

    def supports(self, problem: ExpertProblem) -> str | None:
        """None when it can serve this problem, otherwise why not and what would do."""
        ...

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D], routing of its T tokens, bank of E experts -> [T, D] in x's dtype."""
        ...
