"""Routings that a backend must cope with, and an expert MLP written another way, to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelab import Routing
from moelab.moe.activation import Activation
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout

EXPERTS, TOP_K = 6, 2


def bank(
    hidden: int = 16,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    experts: int = EXPERTS,
    activation: Activation | None = None,
    bias: bool = False,
) -> ExpertBank:
    """Random weights."""
    made = ExpertBank(ExpertLayout(experts, TOP_K, width), hidden, activation, bias=bias).to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def _weights(count: int) -> Tensor:
    return torch.rand(count).add_(0.1).requires_grad_()


def even(tokens: int = 24) -> Routing:
    expert = torch.stack([torch.arange(tokens) % EXPERTS, (torch.arange(tokens) + 1) % EXPERTS], 1)
    return Routing.from_topk(expert, _weights(tokens * TOP_K).view(tokens, TOP_K), EXPERTS)


def skewed(tokens: int = 40) -> Routing:
    scores = torch.randn(tokens, EXPERTS) + torch.tensor([3.0, 1.0, 0.0, 0.0, -1.0, -3.0])
    return Routing.from_topk(scores.topk(TOP_K).indices, _weights(tokens * TOP_K).view(tokens, TOP_K), EXPERTS)


def starved(tokens: int = 11) -> Routing:
    """Experts 0, 2 and 5 get nothing."""
    expert = torch.tensor([[1, 3], [3, 4], [4, 1]])[torch.arange(tokens) % 3]
    return Routing.from_topk(expert, _weights(tokens * TOP_K).view(tokens, TOP_K), EXPERTS)


def one_expert(tokens: int = 13) -> Routing:
    return Routing.from_topk(torch.full((tokens, 1), 3), _weights(tokens).view(tokens, 1), EXPERTS)


def one_token() -> Routing:
    return even(1)


def no_tokens() -> Routing:
    return even(0)


def expert_choice(tokens: int = 15, capacity: int = 4) -> Routing:
    """Each expert takes `capacity` tokens: a token has 0 .. E experts."""
    token = torch.stack([torch.randperm(tokens)[:capacity] for _ in range(EXPERTS)]).flatten()
    expert = torch.arange(EXPERTS).repeat_interleave(capacity)
    return Routing.from_assignments(token, expert, _weights(token.numel()), tokens, EXPERTS)


def all_dropped(tokens: int = 5) -> Routing:
    nothing = torch.empty(0, dtype=torch.int64)
    return Routing.from_assignments(nothing, nothing, _weights(0), tokens, EXPERTS)


CASES: dict[str, Callable[[], Routing]] = {
    made.__name__: made
    for made in (even, skewed, starved, one_expert, one_token, no_tokens, expert_choice, all_dropped)
}


def reference(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
    """Every assignment by itself, in float64: no sorting, no grouping, no in-place sums."""
    out = [torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(routing.num_tokens)]
    for token, expert, weight in zip(
        routing.token.tolist(), routing.expert.tolist(), routing.weight.double(), strict=True
    ):
        out[token] = out[token] + weight * output_of(bank, expert, x[token].double())
    return torch.stack(out) if out else torch.zeros(0, x.shape[1], dtype=torch.float64)


def output_of(bank: ExpertBank, expert: int, x: Tensor) -> Tensor:
    """x [D] -> [D], in float64."""
    pre = bank.gate_up[expert].double() @ x
    if bank.gate_up_bias is not None:
        pre = pre + bank.gate_up_bias[expert].double()
    width = bank.moe_intermediate_size
    act = bank.activation(pre[:width], pre[width:]) if bank.activation.gated else bank.activation(pre)
    y = bank.down[expert].double().T @ act
    return y if bank.down_bias is None else y + bank.down_bias[expert].double()


def gradients(y: Tensor, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Zeros where an input has no influence."""
    if not y.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(y, inputs, upstream.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
