"""Null experts among the choices: tokens decide how many real ones they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import (
    Component,
    ConfigError,
    ExpectedAssignments,
    MoEContext,
    Router,
    Routing,
    TokenInfo,
    component,
    hookimpl,
)
from moelab.moe.bias import proportional_update
from moelab.moe.selection import normalise, softmax_score
from moelab.moe.topk import TopKOptions, TopKRouter

OUTPUTS = ("zero", "copy")
UNUSED = ("n_group", "document_pool", "token_table", "capacity_factor", "eval_capacity_factor", "weights_on")


@dataclass
class NullExpertsOptions(TopKOptions):
    num_null_experts: int = 1  # choices that compute nothing; as many as experts halve the expected compute
    norm_topk_prob: bool = True  # over the choices that give something (AdaMoE); false: p as it is (LongCat)
    null_output: str = "zero"  # zero (AdaMoE) or copy: they give x back (LongCat)
    # balance=proportional: real experts that a token is to take on average; null: K E / (E + num_null_experts)
    target_experts: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_null_experts < 1:
            raise ValueError(f"num_null_experts must be at least 1, not {self.num_null_experts}")
        if self.null_output not in OUTPUTS:
            raise ValueError(f"null_output must be one of {', '.join(OUTPUTS)}, not '{self.null_output}'")
        if self.balance not in ("none", "proportional"):
            raise ValueError(f"balance must be none or proportional beside null experts, not '{self.balance}'")
        if self.target_experts is not None and self.balance == "none":
            raise ValueError("target_experts needs balance=proportional, which steers towards it")
        for key in UNUSED:
            if getattr(self, key) != TopKOptions.__dataclass_fields__[key].default:
                raise ValueError(f"{key} can't be used beside null experts")


class NullExperts(TopKRouter):
    """The K best of real and null experts, with a bias that steers how many are real.

    Formula: p = softmax(W x) over E + m, S = top-K(p + b); w_i = p_i, divided by the sum of p over the real ones in S
    (over all of S with null_output=copy) where norm_topk_prob is set; times routed_scaling_factor. A null expert gives
    0, or x. balance=proportional: after each step b_i += bias_update_rate (K_e / (K E) - load_i / (K T)) for the real
    ones, and 0 for the null ones.
    Source: AdaMoE (2406.13233) 3.2 (section not opened). LongCat-Flash (2509.01322): transformers' longcat_flash for
    the routing (null_output copy, norm_topk_prob false, scaling 6, 256 beside 512 experts, 12 a token); the update is
    its eq. 2, and it gives no rate. Its loss over groups of experts is null_load_balance of kind device.
    Use: adaptive compute at a bounded maximum; raise num_experts_per_tok accordingly. Without balance the loss
    null_load_balance of kind average, which leaves tokens free to differ in their number of nulls.
    Cost: m more router rows; on average K E / (E + m) experts a token at balance, or `target_experts`.
    """

    options: NullExpertsOptions

    weigh = None  # type: ignore[assignment]  # a token has different numbers of experts
    equal_rows = None  # copies of experts leave fewer places to the null ones

    def __init__(self, options: NullExpertsOptions, context: MoEContext) -> None:
        choices = context.num_experts + options.num_null_experts
        super().__init__(options, context, softmax_score, choices)
        even = self.top_k * self.num_experts / choices
        self.target = even if options.target_experts is None else options.target_experts
        if not 0 < self.target < min(self.top_k, self.num_experts):
            raise ConfigError(
                f"target_experts: {self.target:g} must be above 0 and below num_experts_per_tok {self.top_k} and "
                f"num_experts {self.num_experts}"
            )

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K_e, or K E / (E + m), what an even load of all choices leaves to the real ones (AdaMoE 2406.13233, 3.2)."""
        if self.options.balance != "none":
            return ExpectedAssignments(self.target, "target_experts, where the bias has led")
        return ExpectedAssignments(self.target, "K E / (E + num_null_experts), at an even load of all choices")

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> up to K real experts for each token, and the bypass of the others where they copy."""
        logits = self.logits(self.jitter(x, info))
        scores = self.score(logits, self.score_function)  # [T, E + m]
        choice = self.select(scores, info)
        probability = scores.gather(1, choice)
        real = choice < self.num_experts
        copies = self.options.null_output == "copy"
        weight = probability if copies else torch.where(real, probability, 0.0)
        if self.norm_topk_prob:
            weight = normalise(weight)
        weight = self.round_weight(weight * self.options.routed_scaling_factor)
        routing = Routing.from_topk(
            choice.clamp_max(self.num_experts - 1), weight, self.num_experts, scores=scores, logits=logits,
            token_mask=info.mask,
        ).serve(real.reshape(-1))  # fmt: skip
        choices = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, choice, True)
        share = torch.where(real, 0.0, weight).sum(-1, keepdim=True)  # [T, 1]
        bypass = (share * x).to(x.dtype) if copies else None
        return replace(routing, choices=choices, bypass=bypass, balance_top_k=self.balance_top_k)

    @torch.no_grad()
    def after_step(self, counts: Tensor, statistics: Tensor | None = None, step: int = 0) -> None:
        """Move the real experts' bias by the loads of the whole batch: counts [E + m] int64."""
        options = self.options
        far = 1.0 if options.bias_schedule is None else options.bias_schedule.factor(step)
        if options.balance == "none" or far == 0:
            return
        real = self.bias[: self.num_experts]
        wanted = self.target / (self.top_k * self.num_experts)
        real.copy_(proportional_update(real, counts, far * options.bias_update_rate, wanted))

    def qwen2_moe_fields(self) -> str:
        return "its null experts have no place there"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("null_experts", NullExpertsOptions, NullExperts)]
