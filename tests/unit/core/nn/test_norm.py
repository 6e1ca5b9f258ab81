"""RMSNorm: its gradients against float64, whatever the rows' number and layout, and what it keeps for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelab.nn.norm import BLOCK, RMSNorm

EPS = 1e-3  # so large that leaving it out would show


def _drawn(*shape: int, width: int = 24) -> tuple[RMSNorm, Tensor, Tensor]:
    """(module, x, gradient of its output)."""
    torch.manual_seed(0)
    norm = RMSNorm(width, EPS)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm, torch.randn(*shape, width).requires_grad_(), torch.randn(*shape, width)


def _exact(norm: RMSNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw in float64, by autograd."""
    wide, weight = (each.detach().double().requires_grad_() for each in (x, norm.weight))
    y = weight * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return (y.detach(), *torch.autograd.grad(y, (wide, weight), dy.double()))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, BLOCK), (3, BLOCK + 1), (0, 4)], ids=str)
def test_output_and_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    norm, x, dy = _drawn(*shape)
    y = norm(x)
    y.backward(dy)
    for found, expected in zip((y, x.grad, norm.weight.grad), _exact(norm, x, dy), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_heads_that_lie_across_memory_have_the_same_gradients() -> None:
    norm, x, dy = _drawn(2, 7, 3)
    norm(x.transpose(1, 2)).backward(dy.transpose(1, 2))
    _, dx, dw = _exact(norm, x, dy)
    torch.testing.assert_close(x.grad, dx.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, dw.float(), rtol=1e-5, atol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_the_other_its_own() -> None:
    norm, x, dy = _drawn(4, 9)
    _, dx, dw = _exact(norm, x, dy)
    norm.weight.requires_grad_(False)
    norm(x).backward(dy)
    assert norm.weight.grad is None
    torch.testing.assert_close(x.grad, dx.float(), rtol=1e-5, atol=1e-5)
    norm.weight.requires_grad_(True)
    norm(x.detach()).backward(dy)
    torch.testing.assert_close(norm.weight.grad, dw.float(), rtol=1e-5, atol=1e-5)


def test_with_and_without_gradients_the_output_has_the_same_bits() -> None:
    norm, x, _ = _drawn(5, 11)
    with torch.no_grad():
        plain = norm(x)
    assert torch.equal(norm(x), plain)


def test_a_backward_pass_under_autocast_is_not_narrowed() -> None:
    norm, x, dy = _drawn(3, BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).backward(dy)
    _, dx, dw = _exact(norm, x, dy)
    torch.testing.assert_close(x.grad, dx.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, dw.float(), rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_x_and_the_weight_alone() -> None:
    norm, x, _ = _drawn(6, 10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), norm.weight.data_ptr()}


def test_second_derivatives_are_those_of_the_formula() -> None:
    norm, x, dy = _drawn(2, 3)
    (dx,) = torch.autograd.grad(norm(x), x, dy, create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), (x, norm.weight))
    wide, weight = (each.detach().double().requires_grad_() for each in (x, norm.weight))
    y = weight * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    (dx,) = torch.autograd.grad(y, wide, dy.double(), create_graph=True)
    for one, expected in zip(found, torch.autograd.grad(dx.square().sum(), (wide, weight)), strict=True):
        torch.testing.assert_close(one, expected.float(), rtol=1e-4, atol=1e-4)
