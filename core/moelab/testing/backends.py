"""What every expert backend must compute: the dense float64 sum, forward and backward, on easy and awkward routings.

With SwiGLU, with activations that no backend can know by name, and with biases: what it can't do, it says.

T tokens, D hidden size, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelab.components import Component
from moelab.moe import promises
from moelab.moe.activation import Activation, SwiGLU
from moelab.moe.contracts import BackendContext, ExpertBackend, ExpertProblem
from moelab.moe.experts import ExpertBank
from moelab.moe.layout import ExpertLayout
from moelab.moe.routing import Routing
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.tensors import assert_close, assert_finite

EXPERTS, TOP_K, WIDTH, HIDDEN = 4, 2, 32, 16
TOLERANCE = 1e-5  # of the largest value, in float32


@dataclass
class BackendCase:
    """One backend under test, on a device and in a dtype. What it does not support is not asked of it."""

    component: Component[BackendContext, ExpertBackend]
    options: Any = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        self.layout = ExpertLayout(EXPERTS, TOP_K, WIDTH)

    def build(self) -> ExpertBackend:
        """A fresh backend."""
        return self.component.build(self.options, BackendContext(self.layout, HIDDEN, 0, dict))

    def problem(
        self, tokens: int, assignments: int, activation: Activation | None = None, bias: bool = False
    ) -> ExpertProblem:
        device = torch.device(self.device)
        return ExpertProblem(
            EXPERTS, HIDDEN, WIDTH, tokens, assignments, device, self.dtype, activation or SwiGLU(), bias
        )

    def agrees(self, routing: Routing, seed: int = 0, activation: Activation | None = None, bias: bool = False) -> None:
        """Output and the gradients of x, weights and experts equal the reference's; where it says it can."""
        backend = self.build()
        if backend.supports(self.problem(routing.num_tokens, routing.expert.numel(), activation, bias)) is not None:
            return
        stream = torch.Generator().manual_seed(seed)
        x = torch.empty(routing.num_tokens, HIDDEN).normal_(generator=stream).to(self.device, self.dtype)
        bank = ExpertBank(self.layout, HIDDEN, activation, bias=bias).to(self.device, self.dtype)
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=stream))
        head = torch.empty(routing.num_tokens, HIDDEN).normal_(generator=stream).to(self.device)
        found = _gradients(lambda a, r: backend(a, r, bank), x, routing, bank, head)
        wide = ExpertBank(self.layout, HIDDEN, activation, bias=bias).to(self.device).double()
        wide.load_state_dict({key: value.double() for key, value in bank.state_dict().items()})
        expected = _gradients(lambda a, r: reference(a, r, wide), x.double(), routing, wide, head.double())
        leaves = ("x", "weight", *(name for name, _ in bank.named_parameters()))
        names = ("output", *(f"the gradient of {key}" for key in leaves))
        for what, ours, theirs in zip(names, found, expected, strict=True):
            assert_finite(ours, what)
            size = float(theirs.abs().max()) if theirs.numel() else 1.0
            assert_close(ours / max(size, 1e-3), theirs / max(size, 1e-3), what, self.tolerance)


def reference(x: Tensor, routing: Routing, bank: ExpertBank) -> Tensor:
    """y[t] = sum over t's assignments of weight * (down activation(gate_up x_t + b) + b'); every expert for all."""
    pre = torch.einsum("td,efd->tef", x, bank.gate_up)
    if bank.gate_up_bias is not None:
        pre = pre + bank.gate_up_bias
    every = torch.einsum("tef,efd->ted", bank.activate(pre), bank.down)
    if bank.down_bias is not None:
        every = every + bank.down_bias
    weights = x.new_zeros(routing.num_tokens, routing.num_experts)
    weights = weights.index_put((routing.token, routing.expert), routing.weight.to(x.dtype), accumulate=True)
    return torch.einsum("te,ted->td", weights, every)


class _Sine:
    """sin(up), which no backend knows by name, and which says nothing of its gradient."""

    gated = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.sin(inputs[0])


class _Product:
    """tanh(gate) * up: a gate that is not SiLU."""

    gated = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.tanh(inputs[0]) * inputs[1]


def _gradients(
    call: Callable[[Tensor, Routing], Tensor], x: Tensor, routing: Routing, bank: ExpertBank, head: Tensor
) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    weight = routing.weight.detach().clone().requires_grad_()
    y = call(x, replace(routing, weight=weight))
    promised(promises.output(y, x))
    leaves = [x, weight, *bank.parameters()]
    gradients = torch.autograd.grad((y * head).sum(), leaves, allow_unused=True)
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return [y.detach(), *filled]


def _topk(tokens: int, experts: Tensor | None = None, device: str = "cpu") -> Routing:
    stream = torch.Generator().manual_seed(tokens)
    if experts is None:
        experts = torch.rand(tokens, EXPERTS, generator=stream).argsort(-1)[:, :TOP_K]
    return Routing.from_topk(experts.to(device), torch.rand(experts.shape, generator=stream).to(device), EXPERTS)


def equals_the_reference(case: BackendCase) -> None:
    """Many tokens, all experts busy."""
    case.agrees(_topk(37, device=case.device))


def serves_empty_experts(case: BackendCase) -> None:
    """Two experts have all tokens; the others' gradients are zero, not missing and not garbage."""
    case.agrees(_topk(9, torch.tensor([[1, 3]]).repeat(9, 1), case.device))


def serves_one_token_and_none(case: BackendCase) -> None:
    """T = 1 and T = 0."""
    for tokens in (1, 0):
        case.agrees(_topk(tokens, device=case.device))


def serves_any_number_of_experts_per_token(case: BackendCase) -> None:
    """Tokens with no, one and all experts, in no order; and no assignment at all."""
    token = torch.tensor([4, 0, 0, 2, 0, 0, 2], device=case.device)
    expert = torch.tensor([2, 3, 1, 0, 0, 2, 3], device=case.device)
    weight = torch.linspace(0.1, 0.9, 7, device=case.device)
    case.agrees(Routing.from_assignments(token, expert, weight, 6, EXPERTS))
    case.agrees(Routing.from_assignments(token[:0], expert[:0], weight[:0], 6, EXPERTS))


def serves_placeholders(case: BackendCase) -> None:
    """Assignments of weight zero add nothing."""
    routing = _topk(11, device=case.device)
    case.agrees(routing.serve(torch.arange(22, device=case.device) % 3 > 0))


def serves_any_activation_or_says_not(case: BackendCase) -> None:
    """Two matrices, and another gate, with and without an empty expert."""
    for activation in (_Sine(), _Product()):
        case.agrees(_topk(37, device=case.device), activation=activation)
        case.agrees(_topk(9, torch.tensor([[1, 3]]).repeat(9, 1), case.device), activation=activation)


def serves_biases_or_says_not(case: BackendCase) -> None:
    """Of gate, up and down; also where tokens have no expert, several, and placeholders."""
    for activation in (SwiGLU(), _Sine()):
        case.agrees(_topk(37, device=case.device), activation=activation, bias=True)
    case.agrees(_topk(9, torch.tensor([[1, 3]]).repeat(9, 1), case.device), bias=True)
    token, expert = (torch.tensor(ids, device=case.device) for ids in ([4, 0, 0, 2], [2, 3, 1, 0]))
    weight = torch.linspace(0.1, 0.9, 4, device=case.device)
    case.agrees(Routing.from_assignments(token, expert, weight, 6, EXPERTS), bias=True)
    case.agrees(_topk(11, device=case.device).serve(torch.arange(22, device=case.device) % 3 > 0), bias=True)


def says_what_it_does_not_support(case: BackendCase) -> None:
    """`supports` answers None or a reason, and there is a name."""
    backend = case.build()
    promised(promises.backend_built(backend), backend)
    for bias in (False, True):
        promised(promises.support(backend.supports(case.problem(8, 16, bias=bias))), backend.supports)


BACKEND_CHECKS: tuple[Callable[[BackendCase], None], ...] = (
    says_what_it_does_not_support,
    equals_the_reference,
    serves_empty_experts,
    serves_one_token_and_none,
    serves_any_number_of_experts_per_token,
    serves_placeholders,
    serves_any_activation_or_says_not,
    serves_biases_or_says_not,
)


def check_backend(
    component: Component[BackendContext, ExpertBackend],
    options: Any = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> None:
    """Run every check of BACKEND_CHECKS; raises ConformanceError naming those that fail."""
    case = BackendCase(component, options, device, dtype, tolerance)
    run_checks("expert backend", component, case, BACKEND_CHECKS)
