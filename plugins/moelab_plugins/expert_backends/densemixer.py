"""DenseMixer: the router hears of every expert, not only of those that a token took."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import BackendContext, Component, ConfigError, ExpertBackend, Routing, component, hookimpl
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import BankView, ExpertBank, compute_dtype


@dataclass
class DenseMixerOptions:
    inner: str = "auto"  # the backend that computes


class DenseMixerBackend:
    """A straight-through gradient: the output is the inner backend's, bit for bit; the router's gradient is dense.

    Formula: y = sum_S w_e f_e(x), and in the backward pass dL/dp_e = c <dL/dy, f_e(x)> for e outside S too, where
    c = w / p of the chosen ones, not differentiated (1, or one over the sum of the chosen with norm_topk_prob). Experts
    outside S and x get no gradient from it.
    Source: DenseMixer (Yao et al. 2025; the official code, github.com/yaof20/DenseMixer: qwen2_moe_custom.py, and
    qwen3_moe_custom.py's `partscale_fix_expert`; the paper was not opened). As there, the weights of the chosen ones
    are differentiated as without it.
    Use: where the router learns too little from K experts. Routers whose weights are their scores times a factor of
    the token: softmax_topk, sigmoid_topk and their kind. Only in training; generation and evaluation are the inner's.
    Cost: a forward pass of all E experts for every token beside the K, which FLOPs count; [E, T, D] of memory. With
    experts on other processes every token's row goes to each expert and back once more: E / K of the exchange there
    and back, and [E, T, D] of memory twice.
    """

    name = "densemixer"
    computes_every_expert = True  # forward, in training; see moelab.nn.count

    def __init__(self, options: DenseMixerOptions, context: BackendContext) -> None:
        self._wanted = options.inner
        self._build_others = context.others
        self._inner: ExpertBackend | None = None
        self._wrap: Callable[[ExpertBackend], ExpertBackend] | None = None

    @property
    def keeps_gate_up_alone(self) -> bool:
        """As the backend that computes; see moelab.planning.saved."""
        return bool(getattr(self._build_others().get(self._wanted), "keeps_gate_up_alone", False))

    def around(self, wrap: Callable[[ExpertBackend], ExpertBackend]) -> ExpertBackend:
        """Itself where scores are known, and its inner backend where the experts lie."""
        outer = copy.copy(self)
        outer._wrap = wrap
        return outer

    def supports(self, problem: ExpertProblem) -> str | None:
        if self._inner is None:
            others = self._build_others()
            if self._wanted not in others:
                known = ", ".join(sorted(others)) or "none inside another backend, which can't choose this one"
                return f"computes nothing itself, and there is no backend '{self._wanted}' for it. Known: {known}"
            self._inner = others[self._wanted]
        return self._inner.supports(problem)

    def __call__(self, x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
        """x [T, D] -> [T, D]. Raises ConfigError for a router without scores, or in chunks, which don't carry them."""
        assert self._inner is not None, "supports is asked first"
        compute = self._inner if self._wrap is None else self._wrap(self._inner)
        y = compute(x, routing, bank)
        if not (torch.is_grad_enabled() and routing.weight.requires_grad):
            return y
        if routing.scores is None:
            raise ConfigError(
                "model.moe.backend: densemixer needs the scores of every expert: take a router that returns them, and "
                "leave model.moe.expert_chunk null, since chunks don't carry them"
            )
        unchosen = _unchosen(routing, routing.scores)
        if self._wrap is not None:
            fixed = BankView(bank, torch.Tensor.detach)
            return y + compute(x.detach(), _to_every_expert(unchosen), fixed)
        every = _every_expert(x, bank)
        return y + torch.einsum("te,etd->td", unchosen.to(every.dtype), every).to(y.dtype)


def _to_every_expert(weight: Tensor) -> Routing:
    """weight [T, E] -> each token to each expert."""
    tokens, experts = weight.shape
    expert = torch.arange(experts, device=weight.device).expand(tokens, experts)
    return Routing.from_topk(expert, weight, experts)


@torch.no_grad()
def _every_expert(x: Tensor, bank: ExpertBank) -> Tensor:
    """x [T, D] -> [E, T, D]."""
    dtype = compute_dtype(x)
    pre = torch.einsum("td,efd->etf", x.to(dtype), bank.gate_up.to(dtype))
    if bank.gate_up_bias is not None:
        pre += bank.gate_up_bias.to(dtype)[:, None, :]
    every = torch.bmm(bank.activate(pre), bank.down.to(dtype))
    return every if bank.down_bias is None else every + bank.down_bias.to(dtype)[:, None, :]


def _unchosen(routing: Routing, scores: Tensor) -> Tensor:
    """[T, E], all 0, with the derivative of c times the score where a token did not take an expert."""
    tokens, experts = routing.num_tokens, routing.num_experts
    own = scores[:, :experts]
    chosen = torch.zeros_like(own, requires_grad=False)
    chosen[routing.token, routing.expert] = 1.0 if routing.served is None else routing.served.to(own.dtype)
    with torch.no_grad():
        total = own.new_zeros(tokens).index_add(0, routing.token, routing.weight.to(own.dtype))
        factor = total / (own * chosen).sum(-1).clamp_min(torch.finfo(own.dtype).tiny)  # [T]
    return (own - own.detach()) * (factor[:, None] * (1 - chosen))


@hookimpl
def moelab_expert_backends() -> list[Component[BackendContext, ExpertBackend]]:
    return [component("densemixer", DenseMixerOptions, DenseMixerBackend)]
