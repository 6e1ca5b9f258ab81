"""An expert backend: every expert for every token, and the sum of what the routing asks for. Simple, and slow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import moelab
from moelab.moe.contracts import ExpertProblem
from moelab.moe.experts import ExpertBank


@dataclass
class Options:
    pass


class MyExpertBackend:
    """y[t] = sum over t's assignments of weight * down(activation(gate x_t, up x_t)), as one dense product.

    T tokens, D hidden size, E experts, F their width. Owns no parameters: they are the bank's.
    """

    name = "my_expert_backend"

    def __init__(self, options: Options, context: moelab.BackendContext) -> None:
        pass

    def supports(self, problem: ExpertProblem) -> str | None:
        """None, or why not and what would do."""
        return "adds no biases; set model.mlp_bias=false" if problem.bias else None

    def __call__(self, x: torch.Tensor, routing: moelab.Routing, bank: ExpertBank) -> torch.Tensor:
        """x [T, D] -> [T, D], in x's dtype; bank.gate_up [E, M F, D] with M 2 or 1, bank.down [E, F, D]."""
        pre = torch.einsum("td,efd->tef", x, bank.gate_up.to(x.dtype))
        every = torch.einsum("tef,efd->ted", bank.activate(pre), bank.down.to(x.dtype))
        weights = x.new_zeros(routing.num_tokens, routing.num_experts)
        weights = weights.index_put((routing.token, routing.expert), routing.weight.to(x.dtype), accumulate=True)
        return torch.einsum("te,ted->td", weights, every)


@moelab.hookimpl
def moelab_expert_backends() -> list[moelab.Component]:
    return [moelab.component("my_expert_backend", Options, MyExpertBackend)]
