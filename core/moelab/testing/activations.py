"""What every activation must do: act on each neuron by itself, make 0 of 0, and differentiate as autograd does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab.components import Component
from moelab.moe import promises
from moelab.moe.activation import Activation, ActivationContext, differentiate, num_inputs
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.tensors import assert_close, assert_finite, host_waits

CONTEXT = ActivationContext(hidden_size=16, layer_id=1, num_hidden_layers=4)
ROWS, WIDTH = 9, 12


@dataclass
class ActivationCase:
    """One activation under test. `reference(*inputs)`, float64, is its closed form, if any."""

    component: Component[ActivationContext, Activation]
    options: Any = None
    reference: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> Activation:
        """A fresh one."""
        built = self.component.build(self.options, CONTEXT)
        promised(promises.activation_built(built), built)
        return built

    def inputs(self, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
        """(gate, up) or (up), [R, F]: small values and some far out, none of them 0."""
        stream = torch.Generator().manual_seed(rows)
        count = num_inputs(self.build())
        made = [torch.empty(rows, WIDTH).normal_(0.0, 1.5, generator=stream) for _ in range(count)]
        for values in made:
            values[::4] *= 20.0
        return [values.to(dtype) for values in made]


def returns_the_shape_and_dtype_of_its_inputs(case: ActivationCase) -> None:
    """[R, F] and [b, r, c], in float64, float32 and bfloat16, for no rows too, without NaN; in a tensor of its own."""
    activation = case.build()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for rows in (ROWS, 0):
            inputs = case.inputs(dtype, rows)
            before = [value.clone() for value in inputs]
            for given in (inputs, [value.unflatten(1, (3, 4)) for value in inputs]):
                with torch.no_grad():
                    y = activation(*given)
                promised(promises.output(y, given[0]), activation)
                assert_finite(y, "output")
            with torch.no_grad():
                activation(*inputs).add_(1.0)
            assert all(map(torch.equal, inputs, before)), "overwrites its inputs, or returns one of them"


def makes_nothing_of_nothing(case: ActivationCase) -> None:
    """0 where all inputs are 0: neurons of zero weight, which even out experts' widths, stay without effect."""
    y = case.build()(*(torch.zeros_like(value) for value in case.inputs()))
    assert not bool(y.any()), "is not 0 where its inputs are 0"


def neurons_are_apart(case: ActivationCase) -> None:
    """Each neuron of each row by itself, so any part of them gives that part."""
    activation, inputs = case.build(), case.inputs()
    whole = activation(*inputs)
    columns = [activation(*(value[:, i : i + 1].contiguous() for value in inputs)) for i in range(WIDTH)]
    assert_close(torch.cat(columns, 1), whole, "one neuron at a time")


def repeats(case: ActivationCase) -> None:
    """No noise, no state: twice the same, and the same of a fresh one."""
    activation, inputs = case.build(), case.inputs()
    first = activation(*inputs)
    assert torch.equal(activation(*inputs), first), "two calls disagree"
    assert torch.equal(case.build()(*inputs), first), "a fresh one computes something else"


def differentiates_as_autograd_does(case: ActivationCase) -> None:
    """`differentiate` gives the call's own result, and gradients equal to autograd's, in float64."""
    activation = case.build()
    inputs = [value.requires_grad_() for value in case.inputs(torch.float64)]
    y = activation(*inputs)
    grad = torch.empty_like(y).normal_(generator=torch.Generator().manual_seed(7))
    expected = torch.autograd.grad(y, inputs, grad)
    with torch.no_grad():
        detached = [value.detach() for value in inputs]
        result, pullback = differentiate(activation, *detached)
        assert_close(result, y, "the result of differentiate", 1e-12)
        result.fill_(float("nan"))  # the caller may overwrite it
        outs = [torch.full_like(value, float("nan")) for value in detached]
        pullback(grad.clone(), *outs)
    for out, wanted in zip(outs, expected, strict=True):
        assert_close(out, wanted, "a gradient of differentiate", 1e-10)


def joined_inputs_give_the_same(case: ActivationCase) -> None:
    """`of_joined`, where it is offered and serves: the call's result and gradients, in float64, twice over."""
    activation = case.build()
    own = getattr(activation, "of_joined", None)
    apart = [value.requires_grad_() for value in case.inputs(torch.float64)]
    joined = torch.stack([value.detach() for value in apart], 1).requires_grad_()
    y = None if own is None else own(joined)
    if y is None:
        return
    expected = activation(*apart)
    assert_close(y, expected, "the result of joined inputs", 1e-12)
    grad = torch.empty_like(y).normal_(generator=torch.Generator().manual_seed(7))
    wanted = torch.stack(torch.autograd.grad(expected, apart, grad), 1)
    for _ in range(2):
        (found,) = torch.autograd.grad(y, joined, grad, retain_graph=True)
        assert_close(found, wanted, "the gradient of joined inputs", 1e-10)


def waits_for_nothing(case: ActivationCase) -> None:
    """No operation asks for a value or for a shape that depends on values."""
    activation, inputs = case.build(), case.inputs()
    found = host_waits(lambda: activation(*inputs))
    assert not found, f"{found[0]} waits for the device"


def equals_its_closed_form(case: ActivationCase) -> None:
    """Where one is declared: equal to it in float64, to 1e-12 of its size."""
    if case.reference is not None:
        inputs = case.inputs(torch.float64)
        assert_close(case.build()(*inputs), case.reference(*inputs), "against the closed form", 1e-12)


ACTIVATION_CHECKS: tuple[Callable[[ActivationCase], None], ...] = (
    returns_the_shape_and_dtype_of_its_inputs,
    makes_nothing_of_nothing,
    neurons_are_apart,
    repeats,
    differentiates_as_autograd_does,
    joined_inputs_give_the_same,
    waits_for_nothing,
    equals_its_closed_form,
)


def check_activation(
    component: Component[ActivationContext, Activation],
    options: Any = None,
    reference: Callable[..., Tensor] | None = None,
) -> None:
    """Run every check of ACTIVATION_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("activation", component, ActivationCase(component, options, reference), ACTIVATION_CHECKS)
