"""MoE++: zero, copy and constant experts beside the real ones, and a residual from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moelab import (
    Component,
    ConfigError,
    ExpectedAssignments,
    ExpertRows,
    MoEContext,
    Router,
    Routing,
    TokenInfo,
    component,
    hookimpl,
)
from moelab.moe.capacity import rank_in_expert, refuse_noncausal
from moelab.moe.gate import GateOptions, LinearRouter, project
from moelab.moe.selection import normalise, softmax_score

WEIGHTS = ("paper", "released")


@dataclass
class MoEPlusPlusOptions(GateOptions):
    num_zero_experts: int = 1  # output 0
    num_copy_experts: int = 1  # output x
    num_constant_experts: int = 2  # output a x + b v, with a learned vector v and learned shares a + b = 1
    gating_residual: bool = True  # add W_g times the logits of the MoE layer below
    weights: str = "paper"  # paper: p as it is (eq. 1); released: the zero expert's is 0, the others then sum to one
    gate_layers: int = 1  # 1: W x (the paper); 2: W tanh(W_h x) of width 8 E' (the released code's default)
    constant_std: float = 1.0  # of v at the start: N(0, 1) in the released code; the paper does not say
    tau: float = 0.75  # a real expert's capacity as a share of a zero-computation expert's
    capacity_factor: float | None = None  # 1.1 in the paper; null: dropless

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.num_zero_experts, self.num_copy_experts, self.num_constant_experts)
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(
                f"numbers of zero, copy and constant experts must not be negative, and not all 0: {counts}"
            )
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not '{self.weights}'")
        if self.gate_layers not in (1, 2) or self.constant_std < 0:
            raise ValueError("gate_layers must be 1 or 2, and constant_std must not be negative")
        if self.gate_layers == 2 and (self.gate != "linear" or self.gate_bias):
            raise ValueError("gate_layers 2 is a gate of its own: leave gate at linear and gate_bias at false")
        if not 0 < self.tau <= 1 or (self.capacity_factor is not None and self.capacity_factor <= 0):
            raise ValueError("tau must be in 0 .. 1, 0 excluded, and capacity_factor positive")


class MoEPlusPlus(LinearRouter):
    """The K best of real, zero, copy and constant experts.

    Formula: z = W x + W_g z_below, p = softmax(z), S = top-K(p), w = p_S, or with `weights: released` w = p_S less the
    zero experts, normalised; the output is the sum of w_i times the expert, 0, x, or a_1 x + a_2 v with (a_1, a_2) =
    softmax(W_c x). Capacity in training: tau M for a real expert, M for one of the Z others, M = capacity_factor K T /
    (tau E + Z).
    Source: MoE++ (2410.07348) 3.1-3.3, eq. 1 and 3-8; with the loss null_load_balance of kind weighted. The paper has
    K = 2. Its eq. 8 has no K: as printed all capacities sum to capacity_factor T for K T choices, so K is our reading.
    Released code (SkyworkAI/MoE-plus-plus 7f43967): `weights: released` and `gate_layers: 2`; it also feeds the experts
    K x unless moe_feature_no_mul_topk is set, which is not done here, and it drops nothing.
    Use: simple tokens skip the experts; tau sets how many do.
    Cost: an [E', E'] product for the residual, and one [T, D] addition.
    """

    def __init__(self, options: MoEPlusPlusOptions, context: MoEContext) -> None:
        free = options.num_zero_experts + options.num_copy_experts + options.num_constant_experts
        super().__init__(options, context, context.num_experts + free)
        if context.num_experts_per_tok > context.num_experts + free:
            raise ConfigError(
                f"num_experts_per_tok {context.num_experts_per_tok} exceeds all {self.weight.shape[0]} choices"
            )
        if options.capacity_factor is not None:
            refuse_noncausal(context, "capacity_factor makes a token's experts depend on later tokens and sequences")
        self.causal = options.capacity_factor is None
        self.options, self.num_free = options, free
        choices, constants = context.num_experts + free, options.num_constant_experts
        self.std = context.initializer_range
        self.hidden = None  # W_h, with which `weight` is the second matrix of two
        if options.gate_layers == 2:
            self.hidden = nn.Parameter(torch.empty(8 * choices, context.hidden_size))
            self.weight = nn.Parameter(torch.empty(choices, 8 * choices))
        self.residual = nn.Parameter(torch.empty(choices, choices)) if options.gating_residual else None
        self.constant = nn.Parameter(torch.empty(constants, context.hidden_size)) if constants else None
        self.constant_gate = nn.Parameter(torch.empty(2 * constants, context.hidden_size)) if constants else None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Constants ~ N(0, constant_std), every matrix ~ N(0, initializer_range)."""
        for name, parameter in self.named_parameters():
            std = self.options.constant_std if name == "constant" else self.std
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> W x or W tanh(W_h x), [T, E']."""
        if self.hidden is None:
            return super().logits(x)
        dtype = self.precision.projection_dtype
        return project(project(x, self.hidden, dtype).tanh(), self.weight, dtype)

    @property
    def expert_rows(self) -> ExpertRows | str:
        """A row for each choice, those that are no experts last; what joins choices with choices can't be cut."""
        if self.hidden is not None:
            return "the width of its hidden layer follows the number of choices (gate_layers: 2)"
        if self.residual is not None:
            return "its residual joins every choice with every other (gating_residual)"
        return super().expert_rows

    @property
    def expected_assignments(self) -> ExpectedAssignments:
        """K tau E / (tau E + Z), the load that the balance loss and the capacities aim at (MoE++ table 1, eq. 7-8)."""
        real = self.options.tau * self.num_experts
        fits = min(1.0, self.options.capacity_factor or 1.0)
        return ExpectedAssignments(
            fits * self.top_k * real / (real + self.num_free),
            "K tau E / (tau E + Z), where null_load_balance leads; K E / (E + Z) before it has",
        )

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """x [T, D] -> up to K real experts for each token, and the bypass of the others."""
        logits = self.logits(x)
        below = None if info.previous is None else info.previous.logits
        if self.residual is not None and below is not None and below.shape == logits.shape:
            logits = logits + below @ self.residual.t().to(logits.dtype)
        scores = self.score(logits, softmax_score)  # [T, E']
        probability, choice = scores.topk(self.top_k, dim=-1)
        kept = self._kept(choice, probability, info)
        weight = torch.where(kept, self.round_weight(self._weigh(probability, choice)), 0.0)
        real = kept & (choice < self.num_experts)
        routing = Routing.from_topk(
            choice.clamp_max(self.num_experts - 1), weight, self.num_experts, scores=scores, logits=logits,
            token_mask=info.mask,
        ).serve(real.reshape(-1))  # fmt: skip
        return replace(
            routing,
            choices=torch.zeros_like(scores, dtype=torch.bool).scatter_(1, choice, True),
            bypass=self._bypass(x, torch.zeros_like(scores).scatter(1, choice, weight)),
            dropped=(~kept & info.valid().unsqueeze(-1)).sum(),
        )

    def _weigh(self, probability: Tensor, choice: Tensor) -> Tensor:
        """probability, choice [T, K] -> the weights [T, K]."""
        if self.options.weights == "paper":
            return probability
        last_zero = self.num_experts + self.options.num_zero_experts
        return normalise(torch.where((choice < self.num_experts) | (choice >= last_zero), probability, 0.0))

    def _bypass(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """x [T, D], weight [T, E'] -> what copy and constant experts add, [T, D] in x's dtype."""
        start = self.num_experts + self.options.num_zero_experts
        copy = weight[:, start : start + self.options.num_copy_experts].sum(-1, keepdim=True)  # [T, 1]
        out = None
        if self.constant is not None and self.constant_gate is not None:
            constant = weight[:, start + self.options.num_copy_experts :]  # [T, C]
            wide = torch.promote_types(x.dtype, torch.float32)
            with torch.autocast(x.device.type, enabled=False):
                gate = nn.functional.linear(x.to(wide), self.constant_gate.to(wide))
                share = gate.unflatten(-1, (-1, 2)).softmax(-1)  # [T, C, 2]
                copy = copy + (constant * share[..., 0]).sum(-1, keepdim=True)
                out = (constant * share[..., 1]) @ self.constant.to(wide)
        bypass = copy * x
        return (bypass if out is None else bypass + out).to(x.dtype)

    def _kept(self, choice: Tensor, probability: Tensor, info: TokenInfo) -> Tensor:
        """choice, probability [T, K] -> [T, K] bool, False over capacity; the likeliest choices of an expert stay."""
        factor = self.options.capacity_factor
        if factor is None or not info.training:
            return torch.ones_like(choice, dtype=torch.bool)
        valid = info.valid()[:, None].expand_as(choice).reshape(-1)
        unit = factor / (self.options.tau * self.num_experts + self.num_free)
        allowed = torch.full((self.weight.shape[0],), unit, device=choice.device, dtype=torch.float64)
        allowed[: self.num_experts] *= self.options.tau
        limit = torch.ceil(allowed * valid.sum() - 1e-9).long()  # [E']
        order = torch.argsort(probability.detach().reshape(-1), descending=True, stable=True)
        rank = rank_in_expert(choice.reshape(-1), valid, order, self.weight.shape[0])
        return ((rank < limit[choice.reshape(-1)]) & valid).view_as(choice)

    def qwen2_moe_fields(self) -> str:
        return "its zero-computation experts have no place there"


@hookimpl
def moelab_routers() -> list[Component[MoEContext, Router]]:
    return [component("moe_plus_plus", MoEPlusPlusOptions, MoEPlusPlus)]
