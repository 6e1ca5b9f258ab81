"""What every shared expert must do. T tokens, D hidden size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelab.components import Component
from moelab.moe import promises
from moelab.moe.contracts import MoEContext, SharedExpert
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.routers import CONTEXT
from moelab.testing.tensors import assert_close, assert_finite, fill_parameters, host_waits, tensors_of

TOKENS = 12


@dataclass
class SharedExpertCase:
    """One shared expert under test. `reference(x, module) -> [T, D]`, both float64, is its closed form, if any."""

    component: Component[MoEContext, SharedExpert | None]
    options: Any = None
    context: MoEContext = CONTEXT
    reference: Callable[[Tensor, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)
        self.x = torch.empty(TOKENS, self.context.hidden_size).normal_(generator=torch.Generator().manual_seed(3))

    def build(self) -> Any:
        """A fresh module with seeded parameters, or None for "no shared expert"."""
        built = self.component.build(self.options, self.context)
        if built is not None:
            assert isinstance(built, nn.Module), promises.shared_expert_built(built)
            fill_parameters(built, 0)
        return built


def returns_the_shape_and_dtype_of_its_input(case: SharedExpertCase) -> None:
    """[T, D] -> [T, D], for some tokens, one and none, in float32 and bfloat16."""
    module = case.build()
    if module is None:
        return
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        for tokens in (TOKENS, 1, 0):
            x = case.x[:tokens].to(dtype)
            y = module(x)
            promised(promises.output(y, x), module)
            assert_finite(y, "output")


def says_how_wide_it_is(case: SharedExpertCase) -> None:
    """`intermediate_size`: the neurons a token passes through, for counting FLOPs."""
    module = case.build()
    if module is not None:
        promised(promises.shared_expert_built(module), module)


def tokens_are_apart(case: SharedExpertCase) -> None:
    """A token's output depends on that token alone: no leak from the future, none between sequences."""
    module = case.build()
    if module is not None:
        whole = module(case.x)
        assert_close(torch.cat([module(row[None]) for row in case.x]), whole, "one token at a time", 1e-5)


def gradients_reach_all_parameters(case: SharedExpertCase) -> None:
    """And x."""
    module = case.build()
    if module is None:
        return
    x = case.x.clone().requires_grad_()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches '{name}'"
        assert bool((parameter.grad != 0).any()), f"the gradient of '{name}' is all zero"
        assert_finite(parameter.grad, f"the gradient of '{name}'")
    assert x.grad is not None, "no gradient reaches x"


def keeps_nothing_and_restores(case: SharedExpertCase) -> None:
    """No tensor stays on the module, and a fresh one with the saved state computes the same."""
    module, other = case.build(), case.build()
    if module is None:
        return
    hanging = set(tensors_of(module))
    fill_parameters(module, 5)
    first = module(case.x)
    assert not set(tensors_of(module)) - hanging, "keeps a tensor on the module"
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(case.x), first), "a restored module computes something else: state is not saved"


def waits_for_nothing(case: SharedExpertCase) -> None:
    """No operation asks for a value or for a shape that depends on values."""
    module = case.build()
    found = [] if module is None else host_waits(lambda: module(case.x))
    assert not found, f"{found[0]} waits for the device"


def equals_its_closed_form(case: SharedExpertCase) -> None:
    """Where one is declared: equal to the float64 reference to 1e-5 of its size."""
    module = case.build()
    if module is not None and case.reference is not None:
        y = module(case.x)
        assert_close(y, case.reference(case.x.double(), module.double()), "against the closed form", 1e-5)


def serves_as_it_computes(case: SharedExpertCase) -> None:
    """What it offers for generation, `serving`, adds what a call gives."""
    module = case.build()
    if module is not None and hasattr(module, "serving"):
        with torch.no_grad():
            base = torch.ones_like(case.x)
            served = module.serving()(base, case.x)
            assert_close(served, base + module(case.x), "`serving` against a call", 1e-5)
            assert bool((base == 1).all()), "`serving` writes into what it adds to"


SHARED_EXPERT_CHECKS: tuple[Callable[[SharedExpertCase], None], ...] = (
    returns_the_shape_and_dtype_of_its_input,
    says_how_wide_it_is,
    tokens_are_apart,
    gradients_reach_all_parameters,
    keeps_nothing_and_restores,
    waits_for_nothing,
    equals_its_closed_form,
    serves_as_it_computes,
)


def check_shared_expert(
    component: Component[MoEContext, SharedExpert | None],
    options: Any = None,
    context: MoEContext = CONTEXT,
    reference: Callable[[Tensor, Any], Tensor] | None = None,
) -> None:
    """Run every check of SHARED_EXPERT_CHECKS; raises ConformanceError naming those that fail."""
    case = SharedExpertCase(component, options, context, reference)
    run_checks("shared expert", component, case, SHARED_EXPERT_CHECKS)
