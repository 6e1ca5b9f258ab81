"""The router behind every "score the experts, keep the K best": score, bias, groups, weights, capacity.

T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelab.errors import ConfigError
from moelab.moe.bias import METHODS, margin_histogram, proportional_update, quantile_update, sign_update
from moelab.moe.capacity import Capacity, check_capacity, refuse_noncausal
from moelab.moe.contracts import ExpectedAssignments, MoEContext
from moelab.moe.document_pool import DocumentPool
from moelab.moe.gate import GateOptions, LinearRouter, noise_generator
from moelab.moe.routing import Routing, TokenInfo
from moelab.moe.schedule import WeightSchedule
from moelab.moe.selection import GROUP_SCORES, check_groups, group_limit, normalise, softmax_score
from moelab.moe.thin_product import reader
from moelab.moe.token_table import TokenTable, token_table


@dataclass
class TopKOptions(GateOptions):
    """What every top-K router takes; the names are Hugging Face's where it has one."""

    norm_topk_prob: bool = False  # True: the K weights sum to one
    routed_scaling_factor: float = 1.0  # on the weights, after normalisation; 2.5 in DeepSeek-V3
    input_jitter: float = 0.0  # in training x is multiplied by U(1 - jitter, 1 + jitter) before the projection
    n_group: int = 1  # groups of experts; 1: no groups
    topk_group: int = 1  # groups that a token may choose from
    group_score: str = "max"  # max (DeepSeek-V2), top2 (V3: sum of the two best), topk (Megatron)
    # none, bias (aux-loss-free, 2408.15664), proportional (LongCat) or quantile (Kimi K3): moves only the selection
    balance: str = "none"
    bias_update_rate: float = 1e-3  # balance=bias: a step towards the under-used; proportional: times what is missing
    bias_schedule: WeightSchedule | None = None  # of how far a step moves the bias; DeepSeek-V3 ends with 0: decay_from
    bias_centred: bool = True  # balance=bias: keep the bias' mean where it is
    quantile_ema: float = 0.0  # balance=quantile: share of the old bias that stays
    capacity_factor: float | None = None  # in training; null: dropless
    eval_capacity_factor: float | None = None  # in evaluation; null: dropless, and causal
    drop_policy: str = "probs"  # probs: the heaviest stay; position: first come, first choices before second
    # A document chooses experts, its tokens among them (EMO): {smallest, largest, evaluation} experts; null: no pools.
    document_pool: DocumentPool | None = None
    # Experts by token id from a fixed table, {seed, frequencies}, weights from the scores (DeepSeek-V4's first layers);
    # null: the scores choose.
    token_table: TokenTable | None = None
    weights_on: str = "output"  # of the experts, or input: each sees w x (Llama 4; Megatron: moe_apply_probs_on_input)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance not in METHODS:
            raise ValueError(f"balance must be one of {', '.join(METHODS)}, not '{self.balance}'")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"group_score must be one of {', '.join(GROUP_SCORES)}, not '{self.group_score}'")
        if self.n_group < 1 or self.topk_group < 1:
            raise ValueError(f"n_group and topk_group must be at least 1, not {self.n_group} and {self.topk_group}")
        if self.weights_on not in ("output", "input"):
            raise ValueError(f"weights_on must be output or input, not '{self.weights_on}'")
        if not 0 <= self.input_jitter < 1:
            raise ValueError(f"input_jitter must be in 0 .. 1, 1 excluded, not {self.input_jitter}")
        if self.bias_update_rate < 0 or not 0 <= self.quantile_ema < 1:
            raise ValueError("bias_update_rate must not be negative, and quantile_ema must be in 0 .. 1, 1 excluded")
        check_capacity(self.capacity_factor, self.eval_capacity_factor, self.drop_policy)


class TopKRouter(LinearRouter):
    """s = score(W x); the K largest of s + bias within pool and groups; weights from s, never from the bias.

    Balance losses count the K largest of s alone (`Routing.balance_map`); where neither bias nor groups move the
    choice, that is the choice.
    """

    def __init__(
        self,
        options: TopKOptions,
        context: MoEContext,
        score: Callable[[Tensor], Tensor],
        num_choices: int | None = None,
    ) -> None:
        super().__init__(options, context, num_choices)
        check_selection(options, context)
        self.options = options
        self.score_function = score
        self.norm_topk_prob = options.norm_topk_prob
        self.capacity = Capacity(options.capacity_factor, options.eval_capacity_factor, options.drop_policy)
        pool = options.document_pool
        self.causal = options.capacity_factor is None and pool is None
        self.causal_in_evaluation = options.eval_capacity_factor is None and (pool is None or pool.evaluation is None)
        # 0: the choices are the best scores already, or of no score, and counting others would cost a top-K.
        moved = options.balance != "none" or options.n_group > 1 or pool is not None
        self.balance_top_k = self.top_k if moved else 0
        if options.balance != "none":
            self.register_buffer("bias", torch.zeros(len(self.weight), dtype=torch.float32))
        if options.token_table is not None:
            self.register_buffer("table", token_table(options.token_table, context))

    @property
    def batch_invariant(self) -> bool:
        """Unless it looks beyond a token, or jitters."""
        return self.causal and self.options.input_jitter == 0

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K, or capacity_factor K where that is less."""
        return self.capacity.expected(self.top_k, self.top_k, "K of the layout")

    @property
    def equal_rows(self) -> str | None:  # type: ignore[override]
        """What equal experts do with the weight that one of them had: `ExpertRows.copies`.

        None where an expert and its copies count otherwise than the expert: a group scored by the sum of some of its
        members, a pool of a fixed number, a weight that each expert's input is multiplied by, places that go by the
        order of a token's choices, which among equals is anyone's.
        """
        options = self.options
        apart = options.document_pool is not None or options.weights_on == "input"
        apart |= options.eval_capacity_factor is not None and options.drop_policy == "position"
        if apart or (options.n_group > 1 and options.group_score != "max"):
            return None
        return "share" if self.norm_topk_prob or self.score_function is softmax_score else "whole"

    @property
    def shared_rows(self) -> tuple[str, ...]:  # type: ignore[override]
        """The selection's bias, where it is added to scores that sum to one."""
        return ("bias",) if self.score_function is softmax_score and self.options.balance != "none" else ()

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> K experts for each token."""
        logits = self.logits(self.jitter(x, info))
        scores = self.score(logits, self.score_function)
        expert = self.select(scores, info)  # [T, K]
        routing = Routing.from_topk(
            expert, self.weigh(scores, expert), self.num_experts, scores=scores, logits=logits, token_mask=info.mask,
            balance_top_k=self.balance_top_k, weights_on_input=self.options.weights_on == "input",
        )  # fmt: skip
        if self.options.balance == "quantile" and info.training:
            routing = replace(routing, statistics=margin_histogram(scores, self.bias, self.top_k, info.mask))
        return self.capacity.apply(self.thin(routing, info), info.training)

    def serving(self) -> Callable[[Tensor, TokenInfo], Routing] | None:
        """`forward` for generation (`moe.contracts.Router`), without what the options leave out; None: nothing is."""
        options, read = self.options, reader(self.weight) if self.reading_input() else None
        own = ("forward", "logits", "score", "select", "weigh", "thin", "round_weight")
        plain = all(getattr(type(self), name) is getattr(TopKRouter, name) for name in own)
        plain &= options.n_group == 1 and options.weights_on == "output"
        plain &= options.document_pool is None and options.token_table is None and self.capacity.evaluation is None
        plain &= self.precision.score_dtype == self.precision.output_dtype == "float32" and self.gate_bias is None
        if read is None or not plain:
            return None
        product, score, top_k, experts = read, self.score_function, self.top_k, self.num_experts
        norm, factor, counted = self.norm_topk_prob, options.routed_scaling_factor, self.balance_top_k
        bias = None if options.balance == "none" else self.bias

        def route(x: Tensor, info: TokenInfo) -> Routing:
            logits = product(x)
            scores = score(logits)
            if bias is None:
                weight, expert = scores.topk(top_k)
            else:
                expert = (scores + bias).topk(top_k).indices
                weight = scores.gather(1, expert)
            if norm:
                weight = normalise(weight)
            if factor != 1.0:
                weight = weight * factor
            return Routing.from_topk(
                expert, weight, experts, scores=scores, logits=logits, token_mask=info.mask, balance_top_k=counted
            )

        return route

    def weigh(self, scores: Tensor, expert: Tensor) -> Tensor:
        """The weights of these experts, whoever chose them: scores [T, E'], expert [T, K] -> [T, K]."""
        weight = scores.gather(1, expert)
        if self.norm_topk_prob:
            weight = normalise(weight)
        factor = self.options.routed_scaling_factor
        return self.round_weight(weight if factor == 1.0 else weight * factor)

    def jitter(self, x: Tensor, info: TokenInfo) -> Tensor:
        """x [T, D] -> x times noise around one, in training; drawn in fp32 (Switch 2101.03961, 2.4)."""
        epsilon = self.options.input_jitter
        if epsilon == 0 or not info.training:
            return x
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        noise.uniform_(1 - epsilon, 1 + epsilon, generator=noise_generator(info, self.layer_id, x.device))
        return x * noise.to(torch.promote_types(x.dtype, torch.float32))

    def thin(self, routing: Routing, info: TokenInfo) -> Routing:
        """Leave assignments out before capacity is counted; here none."""
        return routing

    def select(self, scores: Tensor, info: TokenInfo) -> Tensor:
        """scores [T, E'] -> expert [T, K] int64. No gradient: a choice has none."""
        options = self.options
        if options.token_table is not None:
            return self.table[info.token_id]
        chosen_by = scores.detach()
        if options.balance != "none":
            chosen_by = chosen_by + self.bias
        if options.document_pool is not None:
            chosen_by = options.document_pool.limit(scores, chosen_by, info, self.layer_id)
        if options.n_group > 1:
            chosen_by = group_limit(chosen_by, options.n_group, options.topk_group, options.group_score, self.top_k)
        return torch.topk(chosen_by, self.top_k).indices

    @torch.no_grad()
    def after_step(self, counts: Tensor, statistics: Tensor | None = None, step: int = 0) -> None:
        """Move the bias by the loads of the whole batch: counts [E] int64, statistics [E * M] fp32 (quantile)."""
        options = self.options
        far = 1.0 if options.bias_schedule is None else options.bias_schedule.factor(step)
        if far == 0:
            return
        if options.balance == "bias":
            self.bias.copy_(sign_update(self.bias, counts, far * options.bias_update_rate, options.bias_centred))
        elif options.balance == "proportional":
            self.bias.copy_(proportional_update(self.bias, counts, far * options.bias_update_rate))
        elif options.balance == "quantile" and statistics is not None:
            stays = 1 - (1 - options.quantile_ema) * min(far, 1.0)
            self.bias.copy_(quantile_update(self.bias, statistics, self.top_k, stays))

    def plain_topk_differs(self) -> str | None:
        """Why this router is not softmax-free plain top-K, for formats that know nothing else; None when it is."""
        options = self.options
        if options.balance != "none":
            return f"its selection bias (balance: {options.balance}) has no place there"
        if options.n_group > 1:
            return "it limits tokens to groups of experts"
        if options.document_pool is not None and options.document_pool.evaluation is not None:
            return "its documents choose pools of experts (document_pool)"
        if options.token_table is not None:
            return "its experts are those of a table (token_table)"
        if options.routed_scaling_factor != 1.0:
            return "it scales its weights by routed_scaling_factor"
        if options.weights_on != "output":
            return "its weights are on what the experts see (weights_on: input)"
        if options.eval_capacity_factor is not None:
            return "it drops what is over capacity in evaluation too (eval_capacity_factor)"
        return None

    bias: Tensor
    table: Tensor

    def extra_repr(self) -> str:
        differing: dict[str, Any] = {
            key: value for key, value in vars(self.options).items() if value != getattr(type(self.options), key, None)
        }
        return ", ".join(f"{key}={value}" for key, value in differing.items())


def check_selection(options: TopKOptions, context: MoEContext) -> None:
    """Raise ConfigError for ways of choosing that the sizes don't allow, or that don't go together."""
    check_groups(context.num_experts, context.num_experts_per_tok, options.n_group, options.topk_group)
    if options.capacity_factor is not None or options.eval_capacity_factor is not None:
        refuse_noncausal(context, "capacity_factor makes a token's experts depend on later tokens and sequences")
    if options.balance == "quantile" and (
        options.n_group > 1 or options.document_pool is not None or context.num_experts_per_tok == context.num_experts
    ):
        raise ConfigError(
            "balance: quantile needs n_group 1, no document_pool, and num_experts_per_tok below num_experts"
        )
    if options.document_pool is not None:
        options.document_pool.check(context.num_experts, context.num_experts_per_tok)
        if options.n_group > 1:
            raise ConfigError(
                "document_pool: a pool may leave fewer than num_experts_per_tok in the allowed groups; n_group 1"
            )
        refuse_noncausal(context, "document_pool makes a token's experts depend on all of its document")
    if options.token_table is not None and (
        options.balance != "none" or options.n_group > 1 or options.document_pool is not None
    ):
        raise ConfigError(
            "token_table: the table alone chooses, so that balance, n_group and document_pool have nothing to say; "
            "leave them at none, 1 and null"
        )
